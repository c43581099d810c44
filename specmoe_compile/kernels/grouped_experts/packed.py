"""Prefill with coded weights: parts of the slots are expanded, then multiplied as plain ones.

Each weight is decoded once, however many tokens use it. The scratch that holds a part is bounded,
and the parts' results are those of one call to the bit.

Shape letters: T tokens, K top-k, H hidden, I expert intermediate, S slots, C slots of a part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specmoe_compile.kernels.grouped_experts.config import block_m
from specmoe_compile.kernels.grouped_experts.launch import launch_grouped
from specmoe_compile.kernels.grouped_experts.plan import plan_tiles
from specmoe_compile.kernels.packed_experts.expand import (
    Scales,
    launch_expand,
    matrix_dtype,
    scales_apart,
)
from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm, part_of
from specmoe_compile.runtime.experts.formats.expert_format import PLAIN_FORMAT
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode, WeightPlanes

SCRATCH_BYTES = 512 << 20
"""Most matrices at a time; one expert's at least."""


def run_packed(y: Tensor, x: Tensor, slots: Tensor, bank: ExpertBank, form: ExpertForm) -> None:
    """`run_grouped_experts_` of coded weights; writes `y`, several launches.

    Args:
        y: [T, K, H]; x: [T, H]; slots: [T, K], -1 for choices to leave out.
    """
    hidden, inner = bank.sizes(form)
    num_slots = bank.up.shape[0]
    sizes = ((form.up_rows(inner), hidden), (hidden, inner))
    codes = (form.format.up, form.format.down)
    dtypes = [matrix_dtype(code, x.dtype) for code in codes]
    expert_bytes = sum(n * k * d.itemsize for (n, k), d in zip(sizes, dtypes, strict=True))
    part = max(1, min(num_slots, SCRATCH_BYTES // expert_bytes))
    scratch = [
        torch.empty((part, *size), dtype=dtype, device=x.device)
        for size, dtype in zip(sizes, dtypes, strict=True)
    ]
    used = torch.zeros(num_slots + 1, dtype=torch.int32, device=x.device)
    # Choices without a slot go to the last entry, which nobody reads.
    at = torch.where(slots < 0, num_slots, slots).reshape(-1).long()
    used.scatter_(0, at, 1)
    plain = form.with_format(PLAIN_FORMAT)
    intermediate = x.new_empty((slots.numel(), inner))
    # A tile is of one slot: the tiles of a part are those of its slots, for which all are sorted.
    rows = block_m(slots.numel(), num_slots, max(dtype.itemsize for dtype in dtypes))
    plan = plan_tiles(slots, num_slots, rows)
    for first in range(0, num_slots, part):
        count = min(part, num_slots - first)
        here = slice(first, first + count)
        pairs = [
            _expanded(planes, code, used[here], matrix[:count], here)
            for planes, code, matrix in zip(
                (bank.up_planes, bank.down_planes), codes, scratch, strict=True
            )
        ]
        (up, up_scales), (down, down_scales) = pairs
        biases = [None if bias is None else bias[here] for bias in (bank.up_bias, bank.down_bias)]
        is_here = (plan.slot >= first) & (plan.slot < first + count)
        launch_grouped(
            x,
            ExpertBank(up, biases[0], down, biases[1]),
            plain,
            plan._replace(slot=torch.where(is_here, plan.slot - first, -1)),
            rows,
            intermediate,
            y,
            (up_scales, down_scales),
        )


def _expanded(
    planes: WeightPlanes, code: WeightCode, used: Tensor, scratch: Tensor, here: slice
) -> tuple[Tensor, Scales | None]:
    """Matrices of some slots, [C, N, K], and the factors that they lack."""
    part = part_of(planes, here)
    if code.is_plain:
        return part.codes, None
    launch_expand(part, code, used, scratch)
    return scratch, scales_apart(part, code, scratch.dtype)
