"""specmoe: run Mixture-of-Experts models whose experts do not fit the fast memory.

    import torch, specmoe_compile
    model = specmoe_compile.from_pretrained("Qwen/Qwen3-30B-A3B", expert_cache="8GiB")
    model = torch.compile(model, backend="specmoe")
    model.generate(**inputs)
    print(specmoe_compile.stats(model))

Importing the package loads neither torch nor transformers; each public name loads what it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specmoe_compile.api import close as close
    from specmoe_compile.api import from_pretrained as from_pretrained
    from specmoe_compile.api import offload as offload
    from specmoe_compile.api import stats as stats
    from specmoe_compile.errors import SpecMoEError as SpecMoEError
    from specmoe_compile.hf.packing import pack as pack
    from specmoe_compile.options import CompileOptions as CompileOptions
    from specmoe_compile.system.progress import on_progress as on_progress

__version__ = "0.1.0"

_PUBLIC = {
    "CompileOptions": "specmoe_compile.options",
    "SpecMoEError": "specmoe_compile.errors",
    "close": "specmoe_compile.api",
    "from_pretrained": "specmoe_compile.api",
    "offload": "specmoe_compile.api",
    "on_progress": "specmoe_compile.system.progress",
    "pack": "specmoe_compile.hf.packing",
    "stats": "specmoe_compile.api",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'specmoe_compile' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
