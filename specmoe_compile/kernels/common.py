"""Triton functions that several kernels share. Importing this module imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Element-wise activation, fp32 -> fp32."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # tanh(u) = 2 sigmoid(2u) - 1: Triton has no tanh on every backend.
        return 0.5 * x * (1.0 + (2.0 * tl.sigmoid(2.0 * inner) - 1.0))
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(ACTIVATION == "relu2", "unknown activation")
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return positive * positive


@triton.jit
def clamp(x, low, high):
    """Clamp that lets NaN through, as torch.clamp does."""
    x = tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def apply_gate(
    gate, up, alpha, limit, ACTIVATION: tl.constexpr, LIMITED: tl.constexpr, AFTER: tl.constexpr
):
    """act(gate) * up with optional limits, or GPT-OSS' swiglu; fp32 -> fp32.

    Args:
        gate, up: same shape, fp32.
        alpha, limit: fp32 scalars; `limit` counts only with LIMITED.
        AFTER: the limit of the gate applies after its activation.
    """
    if LIMITED:
        up = clamp(up, -limit, limit)
        if not AFTER:
            gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "swiglu_oai":
        return (up + 1.0) * (gate * tl.sigmoid(gate * alpha))
    else:
        gate = activate(gate, ACTIVATION)
        if LIMITED and AFTER:
            gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        return gate * up
