"""What the passes on the aten graph need to know; hashed into the identity of the compiled code."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from specmoe_compile.predict.registry import (
    DEFAULT_PREDICTOR,
    PREDICTORS,
    State,
    without_auto,
)

if TYPE_CHECKING:
    from specmoe_compile.options import CompileOptions
    from specmoe_compile.predict.registry import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class PassConfig:
    """How a graph is rewritten. Every field changes the rewritten graph.

    What a miss gets (`policy`) is not here: the session decides it at run time, and the graph is
    the same for all policies.
    """

    prefetch: bool = True
    """Insert prefetches; False leaves the graph as it is."""
    lookahead: int = 1
    """MoE layers between a prediction and its use (>= 1)."""
    prefetch_width: int | None = None
    """Experts predicted per token; None, or not above the model's top-k, keeps its top-k."""
    skip_layers: tuple[int, ...] = ()
    """MoE layers, by ordinal, that are not predicted."""
    most_tokens: int | None = None
    """Steps known to have more tokens are prefill and are not predicted; None predicts all."""
    control: bool = False
    """Feed the lookahead with the true router input; nothing is hidden, and recall is 100 %."""
    predictor: str = DEFAULT_PREDICTOR
    """What predicts, a name of `PREDICTORS`; in control mode it is the router whatever is named."""
    network_layers: tuple[int, ...] = ()
    """Layers that a hybrid predictor predicts with their networks."""

    conditional: bool = False
    """Let the session skip speculation at run time; only where the host decides, not on a GPU."""

    inductor: bool = True
    """Inductor compiles the rewritten graph, which then settles what Inductor would leave open."""

    def __post_init__(self) -> None:
        if self.lookahead < 1:
            raise ValueError(f"lookahead={self.lookahead}: expected an integer >= 1")
        if self.prefetch_width is not None and self.prefetch_width < 1:
            raise ValueError(f"prefetch_width={self.prefetch_width}: expected an integer >= 1")
        if self.most_tokens is not None and self.most_tokens < 1:
            raise ValueError(f"most_tokens={self.most_tokens}: expected an integer >= 1")
        if self.predictor not in PREDICTORS:
            raise ValueError(f"predictor={self.predictor!r}: choose {' or '.join(PREDICTORS)}")
        if any(layer < 0 for layer in self.skip_layers):
            raise ValueError(f"skip_layers={self.skip_layers}: expected MoE layer numbers >= 0")

    @property
    def state(self) -> State:
        """The activation that predictions read."""
        return PREDICTORS[self.predictor].state

    def source_of(self, layer: int) -> Source:
        """What computes the predictions of a layer."""
        predictor = PREDICTORS[self.predictor]
        if self.control:
            return "router"
        return "network" if predictor.hybrid and layer in self.network_layers else predictor.source

    @classmethod
    def from_options(
        cls,
        options: CompileOptions,
        *,
        offloaded: bool = True,
        conditional: bool = False,
        network_layers: tuple[int, ...] = (),
    ) -> PassConfig:
        """Take the fields of a compile's options.

        Args:
            options: options of `torch.compile`; `skip_layers="auto"`, if it was not resolved to
                layers, skips none here.
            offloaded: whether there is anything to fetch; a plain model's experts are all there.
            conditional: whether the graph may branch on the sessions' `plan_step`.
            network_layers: layers that a hybrid predictor predicts with their networks.
        """
        from specmoe_compile.options import MAX_DECODE_TOKENS

        given = options.skip_layers
        return cls(
            prefetch=options.prefetch and offloaded,
            lookahead=options.lookahead,
            prefetch_width=options.prefetch_width,
            skip_layers=given if isinstance(given, tuple) else (),
            most_tokens=MAX_DECODE_TOKENS,
            control=options.control,
            predictor=without_auto(options.predictor),
            network_layers=network_layers,
            conditional=conditional,
            inductor=options.lowering == "inductor",
        )

    def key(self) -> str:
        """Hash of all fields."""
        text = repr([(f.name, getattr(self, f.name)) for f in fields(self)])
        return hashlib.sha256(text.encode()).hexdigest()
