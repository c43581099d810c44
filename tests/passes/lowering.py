"""Compile a model with the passes, through Inductor or to a graph that runs node by node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from specmoe_compile.system.inductor import cpu_settings


def compile_with(model: nn.Module, speculation: Any) -> Callable[..., Any]:
    """Compile through all of Inductor, set up as the backend does, with `speculation` as its pass.

    Layers of one shape have kernels of one source then, which is compiled once.
    """
    from torch._inductor.compile_fx import compile_fx

    def backend(gm: Any, example_inputs: Any) -> Any:
        patches = {
            **cpu_settings(),
            "post_grad_custom_pre_pass": speculation,
            "freezing": False,
        }
        return compile_fx(gm, example_inputs, config_patches=patches)

    return torch.compile(model, backend=backend)  # type: ignore[no-any-return]


def interpret_with(model: nn.Module, speculation: Any) -> Callable[..., Any]:
    """Compile to the rewritten aten graph and run that node by node."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def lower(gm: Any, example_inputs: Any) -> Any:
        speculation(gm.graph)
        gm.recompile()
        return make_boxed_func(gm.forward)

    return torch.compile(model, backend=aot_autograd(fw_compiler=lower))  # type: ignore[no-any-return]
