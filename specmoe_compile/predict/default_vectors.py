"""Default vectors: the mean output of each expert, learned while the model runs.

d[l, e] is the mean of expert e's unweighted output over the tokens that used it in layer l. The sum
of the default vectors of a token's experts, by router weight, stands in for the experts' output
where a prediction needs it before the experts ran ("Speculating Experts", arXiv 2603.19289).

Shape letters: T tokens, E experts, K top-k, H hidden, L MoE layers.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

DECODE_SAMPLES = 64
"""Decoding adds to an expert's mean up to this many samples, and then pays nothing for it."""
PREFILL_SAMPLES = 4096
"""Prefill, where a sample costs next to nothing, goes on up to this many."""
STEP_SAMPLES = 256
"""Most samples of one expert that one step adds: the first ones, in token order."""
_DENSE_TOKENS = 16


class DefaultVectors:
    """Running means of every layer, in float32; zero until the first sample.

    Attributes:
        tables: [E, H] float32 of each layer.
        counts: [E] int64 of each layer, samples so far.
        frozen_flag: [1] int64, what `frozen` says; memory that others may read.
    """

    def __init__(
        self,
        num_experts: Sequence[int],
        hidden_sizes: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        decode_samples: int = DECODE_SAMPLES,
        prefill_samples: int = PREFILL_SAMPLES,
    ) -> None:
        """Start at zero.

        Args:
            num_experts: E of each layer.
            hidden_sizes: H of each layer.
            device: where the tables are.
            decode_samples: steps of few tokens stop learning an expert at this many samples.
            prefill_samples: steps of many tokens, at this many.
        """
        shapes = list(zip(num_experts, hidden_sizes, strict=True))
        self.tables = [torch.zeros(e, h, dtype=torch.float32, device=device) for e, h in shapes]
        self.counts = [torch.zeros(e, dtype=torch.int64, device=device) for e, _ in shapes]
        self.frozen_flag = array("q", [False])
        self._decode_samples = decode_samples
        self._prefill_samples = prefill_samples
        # Experts that still learn, so that no tensor has to be asked.
        self._learning: list[set[int]] = [set(range(e)) for e, _ in shapes]
        self._young: list[set[int]] = [set(range(e)) for e, _ in shapes]

    @property
    def frozen(self) -> bool:
        """Whether `update` is a no-op, as after `load`."""
        return bool(self.frozen_flag[0])

    @frozen.setter
    def frozen(self, frozen: bool) -> None:
        self.frozen_flag[0] = frozen

    @property
    def decode_samples(self) -> int:
        """Samples up to which decoding adds to an expert's mean."""
        return self._decode_samples

    def blend(self, layer: int, ids: Tensor, weights: Tensor, like: Tensor) -> Tensor:
        """Weighted sum of default vectors over K.

        Args:
            layer: MoE layer ordinal.
            ids: [T, K] int64 or int32.
            weights: [T, K] float.
            like: tensor whose dtype the result has.

        Returns:
            [T, H].
        """
        table = self.tables[layer]
        if ids.shape[0] <= _DENSE_TOKENS:
            rows, share = table.index_select(0, ids.reshape(-1)), weights.float()
            if len(ids) == 1:
                out = torch.mm(share, rows)
            else:
                out = torch.bmm(share.unsqueeze(1), rows.view(*ids.shape, -1)).squeeze(1)
        else:
            # One product with a [T, E] matrix needs no [T, K, H] copy of the tables.
            dense = torch.zeros(ids.shape[0], table.shape[0], device=ids.device)
            dense.scatter_add_(1, ids.long(), weights.float())
            out = dense @ table
        return out if out.dtype == like.dtype else out.to(like.dtype)

    def update(self, layer: int, ids: Tensor, y: Tensor, experts: Sequence[int]) -> None:
        """Count one step's outputs in.

        Args:
            layer: MoE layer ordinal.
            ids: [T, K] int64 or int32, whose outputs these are.
            y: [T, K, H] float, unweighted outputs; every row of `experts` is valid.
            experts: the distinct experts of the step that were computed.
        """
        decode = ids.shape[0] <= _DENSE_TOKENS
        learning = (self._young if decode else self._learning)[layer]
        if self.frozen or learning.isdisjoint(experts):
            return
        flat, rows = ids.reshape(-1).long(), y.reshape(-1, y.shape[-1])
        if len(flat) == len(experts):
            self._add_one_each(layer, flat.tolist(), rows)
            return
        chosen = torch.tensor(sorted(learning.intersection(experts)), device=y.device)
        sums, new = _sum_by_expert(chosen, flat, rows)
        table, counts = self.tables[layer], self.counts[layer]
        counts[chosen] += new
        # mean += (sum of the new samples - their number * mean) / samples so far
        mean, samples = table[chosen], counts[chosen]
        table[chosen] = mean + (sums - new.unsqueeze(1) * mean) / samples.unsqueeze(1)
        for expert, count in zip(chosen.tolist(), samples.tolist(), strict=True):
            self._retire(layer, expert, count)

    def _add_one_each(self, layer: int, experts: Sequence[int], rows: Tensor) -> None:
        """Count one sample of each expert in, [K, H]; in decoding, so free of small tensors."""
        table, counts, young = self.tables[layer], self.counts[layer].numpy(), self._young[layer]
        for row, expert in enumerate(experts):
            # Steps in C++ count, too, and retire nobody.
            if expert in young and counts[expert] < self._decode_samples:
                counts[expert] += 1
                count = int(counts[expert])
                table[expert].lerp_(rows[row].float(), 1.0 / count)
                self._retire(layer, expert, count)

    def _retire(self, layer: int, expert: int, count: int) -> None:
        if count >= self._decode_samples:
            self._young[layer].discard(expert)
        if count >= self._prefill_samples:
            self._learning[layer].discard(expert)

    def load(self, tables: Sequence[Tensor]) -> None:
        """Use given vectors, [E, H] of each layer, and stop learning.

        Raises:
            ValueError: their number or shapes are not this model's.
        """
        wanted = [tuple(table.shape) for table in self.tables]
        got = [tuple(table.shape) for table in tables]
        if wanted != got:
            raise ValueError(f"Default vectors have shapes {got}, but the model needs {wanted}.")
        for table, given in zip(self.tables, tables, strict=True):
            table.copy_(given)
        self.frozen = True


def _sum_by_expert(chosen: Tensor, flat: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the rows of each of `chosen` ([C]): (sums [C, H] float32, counts [C] int64)."""
    order = torch.argsort(flat, stable=True)
    ends = torch.bincount(flat).cumsum(0).tolist()
    sums = torch.empty(len(chosen), rows.shape[-1], device=rows.device)
    counts: list[int] = []
    for place, expert in enumerate(chosen.tolist()):
        start = ends[expert - 1] if expert else 0
        own = rows[order[start : min(ends[expert], start + STEP_SAMPLES)]]
        torch.sum(own.float(), dim=0, out=sums[place])
        counts.append(len(own))
    return sums, torch.tensor(counts, device=rows.device)
