"""A made-up model's records, for tests of stores that need no model."""

from __future__ import annotations

from typing import Any

import torch

from specmoe_compile.runtime.experts.layout import ExpertLayout, StoreLayer


class RandomSource:
    """Random records of two layers that differ in shapes, data type and number of experts."""

    def __init__(self, *, seed: int = 0, layers: int = 2, hidden: int = 24) -> None:
        gated = ExpertLayout.from_shapes(
            {
                "gate_up_proj": ((2 * 40, hidden), torch.bfloat16),
                "down_proj": ((hidden, 40), torch.bfloat16),
            }
        )
        biased = ExpertLayout.from_shapes(
            {
                "gate_up_proj": ((hidden, 96), torch.float32),
                "gate_up_proj_bias": ((96,), torch.float32),
                "down_proj": ((48, hidden), torch.float32),
                "down_proj_bias": ((hidden,), torch.float32),
            }
        )
        self.layers = tuple(
            StoreLayer(
                name=f"layers.{i}.experts",
                num_experts=5 + i % 2,
                layout=gated if i % 2 == 0 else biased,
            )
            for i in range(layers)
        )
        self.fingerprint = f"{seed:064x}"
        self.name = "random"
        self.top_k = 2
        self.source_files: dict[str, tuple[int, int]] = {}
        self.content: Any = None
        self._seed = seed

    def tensors(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """The tensors of one expert."""
        generator = torch.Generator().manual_seed(self._seed * 10_000 + layer * 100 + expert)
        return {
            spec.name: torch.randn(spec.shape, generator=generator).to(spec.dtype)
            for spec in self.layers[layer].layout.tensors
        }

    def fill(self, layer: int, expert: int, record: torch.Tensor) -> None:
        values = self.tensors(layer, expert)
        for name, view in self.layers[layer].layout.views(record).items():
            view.copy_(values[name])


def assert_record(source: RandomSource, layer: int, expert: int, record: torch.Tensor) -> None:
    """A record holds the source's tensors bit by bit, and zeros between them."""
    layout = source.layers[layer].layout
    expected = torch.zeros(layout.record_bytes, dtype=torch.uint8)
    source.fill(layer, expert, expected)
    assert torch.equal(record, expected)
