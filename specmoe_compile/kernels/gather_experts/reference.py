"""What `gather_experts` does, in plain torch.

Shape letters: E experts, S slots, N fills at most.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def gather_experts_reference(
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    fill_experts: Tensor,
    fill_slots: Tensor,
    fill_count: Tensor,
) -> None:
    """Copy record by record; waits for the device. Args: see `gather_experts`."""
    count = int(fill_count)
    fills = zip(fill_experts[:count].tolist(), fill_slots[:count].tolist(), strict=True)
    for expert, slot in fills:
        if expert < 0 or slot < 0:
            continue
        for source, destination in zip(sources, destinations, strict=True):
            destination[slot].copy_(source[expert])
