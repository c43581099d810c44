"""Decides which predictions are worth their while, from what earlier ones brought.

Which guesses are read is a matter of how often they are right, by layer and rank, with a
`PrefetchGate` each. The rank of a guess is its place among the predicted experts, heaviest first:
heavy ones are nearly always right, light ones often not.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from specmoe_compile.runtime.policy.amount import PrefetchGate
from specmoe_compile.runtime.transfer.base import DONE, RUNNING, Issued


class PrefetchJudge:
    """Gates of every layer, and what they are told.

    Attributes:
        ranks: of each layer, by rank, whether such a guess is read.
    """

    def __init__(self, layers: int) -> None:
        """Start with every gate open."""
        self.ranks: list[list[PrefetchGate]] = [[] for _ in range(layers)]

    def predicts(self, layer: int) -> bool:
        """Whether a layer is to be predicted in this step; asked once per step."""
        ranks = self.ranks[layer]
        if not ranks or any(gate.is_open for gate in ranks):
            return True
        for gate in ranks:
            gate.admits()  # the step counts for them
        return False

    def admitted(
        self, layer: int, experts: Sequence[int], width: int
    ) -> tuple[list[int], dict[int, int]]:
        """Choose the guesses to read.

        Args:
            layer: MoE layer ordinal.
            experts: distinct guesses, the most wanted first.
            width: guesses per token.

        Returns:
            Those whose ranks are right often enough, in the same order; and every guess's rank.
        """
        gates = self.ranks[layer]
        while len(gates) < width:
            gates.append(PrefetchGate())
        # A batch has more guesses than a token has: its ranks are those of one token, stretched.
        most = max(width, len(experts))
        ranks = {expert: place * width // most for place, expert in enumerate(experts)}
        is_open = [gate.admits() for gate in gates[:width]]
        return [expert for expert in experts if is_open[ranks[expert]]], ranks

    def measure(
        self,
        layer: int,
        issued: Issued,
        ranks: dict[int, int],
        wanted: Collection[int],
    ) -> list[int]:
        """Take in what one prediction brought, when the layer says what it wants.

        Args:
            layer: MoE layer ordinal.
            issued: the reads of the prediction.
            ranks: rank of each guess.
            wanted: the experts that the layer needs.

        Returns:
            Experts that useless guesses pushed out of their slots, to be counted if they are read
            again.
        """
        by_rank: dict[int, list[int]] = {}
        for expert, read in issued.reads.items():
            if read.state in (RUNNING, DONE):  # else it cost nothing, and said nothing
                by_rank.setdefault(ranks[expert], [0, 0])[expert not in wanted] += 1
        for rank, (right, wrong) in by_rank.items():
            self.ranks[layer][rank].measure(right, wrong)
        return evicted_for_nothing(issued, wanted)


def evicted_for_nothing(issued: Issued, wanted: Collection[int]) -> list[int]:
    """Experts that made room for guesses that nobody wanted."""
    useful = sum(expert in wanted for expert in issued.reads)
    return issued.evicted[useful:]  # the first ones would have gone for those anyway
