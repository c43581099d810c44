"""Triton kernel of `note_prompt`: one program that holds a layer's counts in registers.

Shape letters: T tokens, K top-k, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specmoe_compile.kernels.plan_cache.scores import RECENCY, count_step, load_scores
from specmoe_compile.runtime.cache.eviction import PROMPT_TOKENS


# As for `plan_cache`: one kernel for all layers, and for every length of a prompt.
@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["ids", "scores", "clock"])
def note_prompt_kernel(
    ids,
    scores,
    clock,
    tokens,
    K: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Count tokens one after the other; grid (1,).

    Args: see `note_prompt`; ids int32 or int64, scores and clock int64; tokens: rows of ids.
    """
    experts = tl.arange(0, BLOCK_E)
    real = experts < E
    fast, middle, slow, seen = load_scores(scores, experts, real, E)
    now = tl.load(clock)
    for token in range(tokens):
        used = tl.zeros([BLOCK_E], tl.int1)
        for choice in tl.static_range(K):
            used = used | (tl.load(ids + token * K + choice) == experts)
        fast, middle, slow = count_step(fast, middle, slow, used)
        now += 1
        seen = tl.where(used, now, seen)
    # No warp may store what another has yet to load.
    tl.debug_barrier()
    tl.store(scores + experts, fast, mask=real)
    tl.store(scores + E + experts, middle, mask=real)
    tl.store(scores + 2 * E + experts, slow, mask=real)
    tl.store(scores + RECENCY * E + experts, seen, mask=real)
    tl.store(clock, now)


def launch_note_prompt(ids: Tensor, scores: Tensor, clock: Tensor) -> None:
    """Launch `note_prompt_kernel` on the current stream; arguments as checked by `note_prompt`."""
    last = ids[-PROMPT_TOKENS:]
    experts = scores.shape[1]
    block_e = triton.next_power_of_2(experts)
    note_prompt_kernel[(1,)](
        last,
        scores,
        clock,
        last.shape[0],
        K=ids.shape[1],
        E=experts,
        BLOCK_E=block_e,
        num_warps=max(1, min(4, block_e // 64)),
        num_stages=1,
    )
