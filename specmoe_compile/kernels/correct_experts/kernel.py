"""Launches of `correct_experts`: the decode kernels, told what is there already.

There is no kernel of its own on purpose. The down projection, the default vectors and the sum over
K are one launch of `down_kernel`, the same compiled code that executes a layer at once, so that the
exact policy gives the same bits whichever experts arrive late.

Shape letters: T tokens, E experts, K top-k, H hidden, I expert intermediate.
"""

from __future__ import annotations

from torch import Tensor

from specmoe_compile.kernels.expert_mlp.launch import launch_down, launch_gate_up
from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm


def launch_correct(
    partial: Tensor,
    x: Tensor,
    slots: Tensor,
    weights: Tensor,
    skipped: Tensor | None,
    default_vectors: Tensor | None,
    bank: ExpertBank,
    form: ExpertForm,
    intermediate: Tensor,
    out: Tensor,
) -> None:
    """Compute what arrived late and complete the layer; two launches on the current stream.

    Args:
        intermediate: [T, K, I], scratch; rows of choices that are not late are not touched.
        out: [T, H], written. The others as in `correct_experts`.
    """
    launch_gate_up(x, slots, bank, form, intermediate)
    launch_down(
        intermediate,
        slots,
        weights,
        bank,
        form,
        out,
        partial=partial,
        skipped=skipped,
        default_vectors=default_vectors,
    )
