"""What `note_prompt` computes: the Python policy of the runtime, on tables that are tensors.

Shape letters: T tokens, K top-k, E experts, D decays.
"""

from __future__ import annotations

from torch import Tensor

from specmoe_compile.runtime.cache.slot_table import ExpertCache


def note_prompt_reference(ids: Tensor, scores: Tensor, clock: Tensor) -> None:
    """Read the tables, let `ExpertCache` count, write them back; waits for the device.

    Args: see `note_prompt`.
    """
    cache = ExpertCache(num_experts=[scores.shape[1]], slots=[1], policy="adaptive")
    cache.scores[0].table[:] = scores.numpy(force=True)
    cache.clock[0] = int(clock)
    cache.note_prompt(0, ids.numpy(force=True))
    scores.copy_(scores.new_tensor(cache.scores[0].table.tolist()))
    clock.fill_(cache.clock[0])
