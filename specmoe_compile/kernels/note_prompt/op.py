"""Op `note_prompt`: counts the experts of a prompt's last tokens, for the decoding that follows.

On CUDA it is one launch that never waits for the device.

Shape letters: T tokens, K top-k, E experts, D decays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specmoe_compile.kernels.checks import INDEX_DTYPES, check_tensor, require_triton
from specmoe_compile.kernels.common_torch import LIBRARY, implement
from specmoe_compile.kernels.note_prompt.reference import note_prompt_reference
from specmoe_compile.kernels.plan_cache.op import MAX_EXPERTS
from specmoe_compile.runtime.cache.eviction import CANDIDATES

_NAME = "note_prompt"
LIBRARY.define(f"{_NAME}(Tensor ids, Tensor(a!) scores, Tensor(b!) clock) -> ()")


def note_prompt(ids: Tensor, scores: Tensor, clock: Tensor) -> None:
    """Count tokens as policy "adaptive" does of a prefill: `ExpertCache.note_prompt`, to the bit.

    Args:
        ids: [T, K] int32 or int64, contiguous: experts of each token, in order; outside of 0..E-1
            they are nobody. The last PROMPT_TOKENS rows are read.
        scores: [D + 1, E] int64, of `CacheTables`; E at most 512. Changed in place.
        clock: [1] int64, of `CacheTables`: a plan for each token that is counted. Changed in place.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or layout.
        SpecMoEError: CUDA tensors without Triton.
    """
    torch.ops.specmoe_kernels.note_prompt(ids, scores, clock)


def _check(ids: Tensor, scores: Tensor, clock: Tensor) -> None:
    check_tensor(_NAME, "ids", ids, ("T", "K"), INDEX_DTYPES)
    check_tensor(_NAME, "scores", scores, (CANDIDATES, "E"), (torch.int64,), like=ids)
    check_tensor(_NAME, "clock", clock, (1,), (torch.int64,), like=ids)
    if not 1 <= scores.shape[1] <= MAX_EXPERTS:
        raise ValueError(
            f"specmoe_kernels::{_NAME}: scores is of {scores.shape[1]} experts, expected 1 to"
            f" {MAX_EXPERTS}"
        )


def _cpu(ids: Tensor, scores: Tensor, clock: Tensor) -> None:
    _check(ids, scores, clock)
    note_prompt_reference(ids, scores, clock)


def _cuda(ids: Tensor, scores: Tensor, clock: Tensor) -> None:
    require_triton(_NAME)
    from specmoe_compile.kernels.note_prompt.kernel import launch_note_prompt

    _check(ids, scores, clock)
    with torch.cuda.device(ids.device):
        launch_note_prompt(ids, scores, clock)


implement(_NAME, cpu=_cpu, cuda=_cuda, fake=_check)
