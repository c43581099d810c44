"""The predictors by name: what each reads, and what computes its prediction.

| computed by | how |
|---|---|
| `router` | a clone of the target's own router, in the graph, on another state |
| `network` | a small trained network of the target (`predictors.network`), held by the session |
| `history` | the session, from what the layer chose before |

Whoever computes it, a prediction is ids and weights [T, P] for `specmoe::start_prefetch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

State = Literal["residual", "quasi", "pre_attention"]
Source = Literal["router", "network", "history"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """What a predictor reads and what computes it.

    Attributes:
        state: activation of one token that it reads: the residual r of the layer before, its
            quasi-hidden state q, or what the attention of the target itself reads.
        source: what computes the prediction; `hybrid` takes the network where that was better in
            calibration, and the router elsewhere.
    """

    state: State
    source: Source
    hybrid: bool = False

    @property
    def needs_networks(self) -> bool:
        """Whether it needs networks from `specmoe calibrate --train-estimator`."""
        return self.source == "network" or self.hybrid


PREDICTORS: Mapping[str, Predictor] = {
    # The layer's router on the state with default vectors in the experts' place.
    "default_vectors": Predictor(
        state="quasi",
        source="router",
    ),
    # The layer's router on the residual, without the experts' output.
    "residual": Predictor(
        state="residual",
        source="router",
    ),
    # The experts that the layer chose for the token before.
    "previous_token": Predictor(
        state="residual",
        source="history",
    ),
    # Two trained linear maps on what the layer's own attention reads.
    "pre_attention": Predictor(
        state="pre_attention",
        source="network",
    ),
    # A small trained network on the state with default vectors.
    "estimator": Predictor(
        state="quasi",
        source="network",
    ),
    # `default_vectors`, and estimator in the layers where calibration found it better.
    "hybrid": Predictor(
        state="quasi",
        source="router",
        hybrid=True,
    ),
}
"""The predictors by name."""

AUTO = "auto"
"""Option `predictor`: `hybrid` with a calibration that holds networks, else DEFAULT_PREDICTOR."""
DEFAULT_PREDICTOR = "default_vectors"
"""What needs no file."""
TRAINED = tuple(name for name, p in PREDICTORS.items() if p.source == "network")
"""Predictors with networks of their own."""


def without_auto(name: str) -> str:
    """The predictor that an option names where no calibration decides `auto`."""
    return DEFAULT_PREDICTOR if name == AUTO else name
