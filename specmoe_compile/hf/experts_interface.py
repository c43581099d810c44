"""The Hugging Face experts implementation "specmoe".

Transformers dispatches every experts module through `ALL_EXPERTS_FUNCTIONS`; registering one
function there serves eager mode, prefill and tracing alike. The function is one node in the graph.

Shape letters: T tokens, K top-k, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import specmoe_compile.ops  # noqa: F401  (registers the ops)
from specmoe_compile.errors import SpecMoEError

IMPLEMENTATION = "specmoe"


def specmoe_experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run an offloaded experts module.

    Args:
        module: experts module that `offload` or `from_pretrained` prepared.
        hidden_states: [..., H], float; the leading dimensions count T tokens.
        top_k_index: [T, K], int64, expert ids.
        top_k_weights: [T, K], float, router weights.

    Returns:
        The weighted sum over K, shape and dtype of `hidden_states`.

    Raises:
        SpecMoEError: the module is not offloaded, or gradients or training are asked for.
    """
    handle: Any = getattr(module, "_specmoe_session", None)
    if handle is None:
        raise SpecMoEError(
            f"{type(module).__name__} is set to the experts implementation 'specmoe' but holds its"
            " own weights: call specmoe_compile.offload(model) first"
        )
    if module.training or (
        torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
    ):
        raise SpecMoEError(
            "specmoe runs experts for inference only, got training mode or inputs that require"
            " gradients: call model.eval() and run under torch.no_grad()"
        )
    out: Tensor = torch.ops.specmoe.experts(
        hidden_states.reshape(-1, hidden_states.shape[-1]),
        top_k_index,
        top_k_weights,
        handle,
        module._specmoe_layer,
    )
    return out.view(hidden_states.shape)


def register_experts_implementation() -> None:
    """Make "specmoe" known to transformers; calling it again changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, specmoe_experts_forward)
