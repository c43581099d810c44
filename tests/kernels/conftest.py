"""Makes Triton's interpreter compute in bfloat16 as a GPU does; nothing on machines with a GPU.

The interpreter cuts off bits where GPUs round to nearest even, and multiplies the bit patterns of
bfloat16 matrices as if they were integers. Left so, tests in bfloat16 would need tolerances too
wide to find anything.

It also takes its time. At every launch, and at every call of a function by a kernel, it looks for
what to replace among all members of Triton's language; it makes the same types and tables of types
again and again; and it computes conditions of overflow, which nothing looks at unless `debug` is
set. Here it remembers what it found and made, and leaves out those conditions.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

if importlib.util.find_spec("triton") is None:
    # Where there is no Triton, only its absence can be tested.
    collect_ignore_glob = ["test_[!c]*.py", "test_c[!h]*.py"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime import interpreter

    _convert_float = interpreter._convert_float
    _create_dot = interpreter.InterpreterBuilder.create_dot

    def _rounding_convert_float(
        values: np.ndarray, source: Any, target: Any, rounding_mode: Any
    ) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return _convert_float(values, source, target, rounding_mode)

    def _converting_create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (builder.cast_impl(matrix, tl.float32) for matrix in (a, b))
        return _create_dot(builder, a, b, *rest)

    def _names_of_builtins(package: Any) -> list[str]:
        return [name for name, at in inspect.getmembers(package) if tl.core.is_builtin(at)]

    _builtin_names = {
        package: _names_of_builtins(package)
        for package in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    }
    _patch_builtin = interpreter._patch_builtin

    def _patch_known_builtins(package: Any, *rest: Any) -> None:
        names = _builtin_names.get(package)
        if names is None:
            _patch_builtin(package, *rest)
            return
        # A kernel that is running has replaced all of them, or none.
        if not tl.core.is_builtin(getattr(package, names[0])):
            return
        for name in names:
            interpreter._patch_attr(package, name, getattr(package, name), *rest)

    def _kept_by_names(make: Callable[..., Any]) -> Callable[..., Any]:
        """Call a function of types once for each; those of blocks have no hash, but full names."""
        made: dict[tuple[str, ...], Any] = {}

        @functools.wraps(make)
        def kept(*types: Any) -> Any:
            names = tuple([each.name for each in types])
            if names not in made:
                made[names] = make(*types)
            return made[names]

        return kept

    assert not interpreter.interpreter_builder.options.debug
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
    tl.block_type.with_element_ty = _kept_by_names(tl.block_type.with_element_ty)
    interpreter._get_np_dtype = _kept_by_names(interpreter._get_np_dtype)
    interpreter._patch_builtin = _patch_known_builtins
    interpreter._convert_float = _rounding_convert_float
    interpreter.InterpreterBuilder.create_dot = _converting_create_dot
