"""One expert on one token as one compiled loop nest, for decoding on the CPU.

A matrix-vector product with a short inner dimension runs at a third of memory bandwidth in the BLAS
that PyTorch carries (measured on a 2-core AMD EPYC 9005, float32, H = 128, I = 2048: 9 GB/s against
26 GB/s). Inductor generates a loop nest that reads each weight once at full bandwidth and fuses the
activation between the two products.

The sums run in another order than the BLAS's, so results differ in the last bits from
`torch.mm`; they do not depend on what else runs, and every path of the runtime takes the same one.

Shape letters: H hidden, I expert intermediate.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from specmoe_compile.system.compilers import COMPILING_BYTES
from specmoe_compile.system.machine import available_ram_bytes
from specmoe_compile.system.sizes import format_bytes

log = logging.getLogger(__name__)

MIN_WEIGHT_BYTES = 256 << 10
"""Smaller experts fit the caches and are computed by `torch.mm`: a call costs more than they do."""

OneToken = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor | None], Tensor]
"""(x [H], up [2I, H] or [I, H], up_bias or None, down [H, I], down_bias or None) -> [H]"""

_compiled: dict[tuple[object, ...], Callable[..., Any] | None] = {}


def one_token_kernel_or_none(
    gate: Callable[[Tensor], Tensor],
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
) -> OneToken | None:
    """Compile the kernel of experts of this shape, or return None where it does not pay.

    None too, with one warning, where there is no C++ compiler or too little RAM for one.

    Args:
        gate: activation between the products, [1, 2I] or [1, I] -> [1, I].
        up: [2I, H] or [I, H], rows contiguous. down: [H, I], rows contiguous.
        up_bias, down_bias: [2I] or [I], and [H].
    """
    if up.stride(-1) != 1 or down.stride(-1) != 1:
        return None  # transposed weights are read along their outputs, which the BLAS does well
    if (up.numel() + down.numel()) * up.element_size() < MIN_WEIGHT_BYTES:
        return None
    present = [t for t in (up, up_bias, down, down_bias) if t is not None]
    traced = _trace(gate, up, up_bias, down, down_bias)
    if traced is None:
        return None
    key = (traced.code, *((tuple(t.shape), t.stride(), t.dtype) for t in present))
    if key not in _compiled:
        _compiled[key] = _compile_or_none(traced, up)
    compiled = _compiled[key]
    if compiled is None:
        return None
    call = compiled

    def run(
        x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None
    ) -> Tensor:
        arguments = [x, up, down]
        if up_bias is not None:
            arguments.append(up_bias)
        if down_bias is not None:
            arguments.append(down_bias)
        out: Tensor = call(*arguments)[0]
        return out

    return run


def _trace(
    gate: Callable[[Tensor], Tensor],
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
) -> torch.fx.GraphModule | None:
    from torch.fx.experimental.proxy_tensor import make_fx

    has_up_bias, has_down_bias = up_bias is not None, down_bias is not None

    def expert(x: Tensor, up: Tensor, down: Tensor, *biases: Tensor) -> tuple[Tensor]:
        left = list(biases)
        # float32 sums, rounded where the BLAS rounds.
        hidden = (up.float() * x.float()).sum(-1).to(x.dtype)
        if has_up_bias:
            hidden = hidden + left.pop(0)
        hidden = gate(hidden.unsqueeze(0)).squeeze(0)
        out = (down.float() * hidden.float()).sum(-1).to(x.dtype)
        if has_down_bias:
            out = out + left.pop(0)
        return (out,)

    biases = [t for t in (up_bias, down_bias) if t is not None]
    with torch.no_grad():
        traced = make_fx(expert, tracing_mode="real")(up.new_empty(up.shape[1]), up, down, *biases)
    constants = [n for n in traced.graph.nodes if n.op == "get_attr"]
    return None if constants else traced  # a gate with tensors of its own is not ours to copy


def _without_grad(compile_fx: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    with torch.no_grad():
        return compile_fx(*arguments)  # type: ignore[no-any-return]


def _compile_or_none(traced: torch.fx.GraphModule, up: Tensor) -> Callable[..., Any] | None:
    free_bytes = available_ram_bytes()
    if free_bytes < COMPILING_BYTES:  # the system would end this process, and not the compiler
        log.warning(
            "torch.mm computes the experts: compiling their kernel takes about %s of RAM, and %s"
            " are free",
            format_bytes(COMPILING_BYTES),
            format_bytes(free_bytes),
        )
        return None
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    examples = [
        torch.empty_strided(node.meta["val"].shape, node.meta["val"].stride(), dtype=up.dtype)
        for node in traced.graph.nodes
        if node.op == "placeholder"
    ]
    try:
        # Without Dynamo: the shapes are the model's, and its guards would cost as much as a small
        # expert. In a thread of its own: the caller may be inside of a compiled graph, whose
        # dispatch state (which is per thread) a compiler must not see.
        with ThreadPoolExecutor(1, thread_name_prefix="specmoe-compile") as pool:
            return pool.submit(_without_grad, compile_fx, traced, examples).result()
    except (CppCompileError, InvalidCxxCompiler) as error:
        log.warning("no C++ compiler for the experts' kernel, torch.mm computes them: %s", error)
        return None
