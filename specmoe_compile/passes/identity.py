"""What the rewritten graph depends on besides the options: sources of the package.

Inductor's FX graph cache answers instead of the passes when their identity is the one that it
knows. So the identity covers every module of the package: constants of kernels, registries, schemas
of ops and what else steers a rewrite. Leaving out what the passes do not import took each process
0.7 to 1.1 s.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

_ROOT = Path(__file__).parents[1]


@functools.cache
def source_hash(root: Path = _ROOT) -> str:
    """Hash of all modules in the package's folder."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(source)} ".encode() + source)
    return digest.hexdigest()
