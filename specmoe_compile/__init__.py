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
    from specmoe_compile.config import CompileOptions as CompileOptions
    from specmoe_compile.errors import SpecMoEError as SpecMoEError
    from specmoe_compile.generation import close as close
    from specmoe_compile.loading import from_pretrained as from_pretrained
    from specmoe_compile.loading import offload as offload
    from specmoe_compile.runtime.packing import pack as pack
    from specmoe_compile.runtime.stats import stats as stats

__version__ = "0.1.0"

_PUBLIC = {
    "CompileOptions": "specmoe_compile.config",
    "SpecMoEError": "specmoe_compile.errors",
    "close": "specmoe_compile.generation",
    "from_pretrained": "specmoe_compile.loading",
    "offload": "specmoe_compile.loading",
    "pack": "specmoe_compile.runtime.packing",
    "stats": "specmoe_compile.runtime.stats",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'specmoe_compile' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
