"""Op `tune_prefetch`: tries how many records a prefetch should bring, by the time that steps take.

One launch per decode step. It reads the device's clock, so that steps of a replayed CUDA graph are
measured and limited without the host.

Shape letters: A amounts that are tried, at most 8.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from specmoe_compile.kernels.checks import check_tensor, require_triton
from specmoe_compile.kernels.common_torch import LIBRARY, implement
from specmoe_compile.kernels.tune_prefetch.reference import (
    MAX_AMOUNTS,
    STATE_WORDS,
    tune_prefetch_reference,
)

_NAME = "tune_prefetch"
LIBRARY.define(
    f"{_NAME}(Tensor(a!) state, Tensor(b!) limit, Tensor amounts, *, Tensor? now=None) -> ()"
)


def tune_prefetch(
    state: Tensor, limit: Tensor, amounts: Tensor, *, now: Tensor | None = None
) -> None:
    """Take in how long the last step took, and choose how many records the next may fetch ahead.

    After WARM_STEPS steps with the first, amounts are tried in turn, BLOCK_STEPS steps each. Steps
    that take four times the shortest are not counted: something else ran. After each of ROUNDS
    rounds, amounts whose mean is worse than the best by more than a margin that shrinks are left
    out. The best is kept for FIRST_HOLD steps, then all are tried again, and each time in a row it
    is kept twice as long.

    Args:
        state: [STATE_WORDS] int64, zeros at first; see `reference` for its words. Changed in place.
        limit: [1] int32, set to the amount of the step that begins.
        amounts: [A] int32, A from 1 to 8; the first is used first.
        now: [1] int64, nanoseconds; by default the clock of the tensors' device.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or layout.
        SpecMoEError: CUDA tensors without Triton.
    """
    torch.ops.specmoe_kernels.tune_prefetch(state, limit, amounts, now=now)


def _check(state: Tensor, limit: Tensor, amounts: Tensor, *, now: Tensor | None = None) -> None:
    check_tensor(_NAME, "state", state, (STATE_WORDS,), (torch.int64,))
    check_tensor(_NAME, "limit", limit, (1,), (torch.int32,), like=state)
    check_tensor(_NAME, "amounts", amounts, ("A",), (torch.int32,), like=state)
    if not 1 <= amounts.shape[0] <= MAX_AMOUNTS:
        raise ValueError(
            f"specmoe_kernels::{_NAME}: amounts has {amounts.shape[0]} entries, expected 1 to"
            f" {MAX_AMOUNTS}"
        )
    if now is not None:
        check_tensor(_NAME, "now", now, (1,), (torch.int64,), like=state)


def _cpu(state: Tensor, limit: Tensor, amounts: Tensor, *, now: Tensor | None = None) -> None:
    _check(state, limit, amounts, now=now)
    now_ns = time.monotonic_ns() if now is None else int(now)
    tune_prefetch_reference(state, limit, amounts, now_ns=now_ns)


def _cuda(state: Tensor, limit: Tensor, amounts: Tensor, *, now: Tensor | None = None) -> None:
    require_triton(_NAME)
    from specmoe_compile.kernels.tune_prefetch.kernel import launch_tune

    _check(state, limit, amounts, now=now)
    with torch.cuda.device(state.device):
        launch_tune(state, limit, amounts, now)


implement(_NAME, cpu=_cpu, cuda=_cuda, fake=_check)
