"""What the passes on the aten graph need to know; hashed into the identity of the compiled code."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

from specmoe_compile.options import MAX_DECODE_TOKENS, GraphOptions
from specmoe_compile.predict.registry import Source, State


@dataclass(frozen=True, slots=True, kw_only=True)
class PassConfig(GraphOptions):
    """The options that change the rewritten graph, and what is known of its sessions."""

    max_tokens: int | None = None
    """Steps known to have more tokens are prefill and are not predicted; None predicts all."""
    network_layers: tuple[int, ...] = ()
    """Layers that a hybrid predictor predicts with their networks."""
    resident_layers: tuple[int, ...] = ()
    """Layers of which no expert is ever missing: nothing to predict, others' may be."""
    conditional: bool = False
    """Let the session skip speculation at run time; only where the host decides, not on a GPU."""

    multiplies: bool = False
    """The sessions' engine multiplies a few tokens with any weight."""
    foreign_ids: tuple[tuple[int, int], ...] = ()
    """Layers with a slot for each of a rank's experts, and the id there of all other ranks'."""
    inbox_groups: tuple[str, ...] = ()
    """Process groups over which small tensors are added up in one launch (`sum_ranks`)."""

    def __post_init__(self) -> None:
        GraphOptions.__post_init__(self)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: expected an integer >= 1")

    @property
    def state(self) -> State:
        """The activation that predictions read."""
        return self.kind.state

    def source_of(self, layer: int) -> Source:
        """What computes the predictions of a layer; in control mode it is the router."""
        if self.control:
            return "router"
        return "network" if self.kind.hybrid and layer in self.network_layers else self.kind.source

    @classmethod
    def from_options(
        cls,
        options: GraphOptions,
        *,
        offloaded: bool = True,
        conditional: bool = False,
        multiplies: bool = False,
        network_layers: tuple[int, ...] = (),
        resident_layers: tuple[int, ...] = (),
        foreign_ids: tuple[tuple[int, int], ...] = (),
        inbox_groups: tuple[str, ...] = (),
    ) -> PassConfig:
        """Take the options that passes read.

        Args:
            options: of a compile.
            offloaded: whether there is anything to fetch; a plain model's experts are all there.
            conditional: whether the graph may branch on the sessions' `plan_step`.
            multiplies: whether the sessions' engine multiplies with weights that are no experts'.
            network_layers: layers that a hybrid predictor predicts with their networks.
            resident_layers: layers of which no expert is ever missing, in none of the sessions.
            foreign_ids: layers of a rank that has slots for all of its own experts, and the id that
                stands for others'.
            inbox_groups: process groups whose ranks' GPUs have inboxes of each other.
        """
        return cls.view(
            options,
            prefetch=options.predicts and offloaded,
            max_tokens=MAX_DECODE_TOKENS,
            network_layers=network_layers,
            resident_layers=resident_layers,
            conditional=conditional,
            multiplies=multiplies,
            foreign_ids=foreign_ids,
            inbox_groups=inbox_groups,
        )

    def key(self) -> str:
        """Hash of all fields."""
        text = repr([(f.name, getattr(self, f.name)) for f in fields(self)])
        return hashlib.sha256(text.encode()).hexdigest()
