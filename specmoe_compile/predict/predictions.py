"""What a session knows to predict its layers with: trained networks, and what they chose last.

Shape letters: T tokens, K top-k, P predicted per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specmoe_compile.errors import SpecMoEError
from specmoe_compile.predict.network import ExpertNetwork
from specmoe_compile.predict.registry import DEFAULT_PREDICTOR, PREDICTORS, Predictor


class Predictions:
    """Answers `specmoe::predict_experts` of one session.

    Attributes:
        networks: by MoE layer; None where a layer has none.
    """

    def __init__(self, layers: int) -> None:
        self.networks: list[ExpertNetwork | None] = [None] * layers
        self._predictor = PREDICTORS[DEFAULT_PREDICTOR]
        self._last: list[Tensor | None] = [None] * layers

    def use(self, predictor: Predictor) -> None:
        """Predict by this one from now on."""
        self._predictor = predictor
        self._last = [None] * len(self._last)

    def load(self, networks: Sequence[ExpertNetwork | None], device: torch.device) -> None:
        """Take the networks of the layers, in order, to a device."""
        self.networks = [None if n is None else n.to(device) for n in networks]

    @property
    def remembers(self) -> bool:
        """Whether what a layer chose is what predicts it."""
        return self._predictor.source == "history"

    def note(self, layer: int, ids: Tensor) -> None:
        """Take in what a layer chose, [T, K] int64 or int32; free unless that is what predicts."""
        if self.remembers:
            self._last[layer] = ids.long().clone()  # graphs reuse their buffers

    def predict(self, layer: int, state: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Predict a layer.

        Args:
            layer: MoE layer ordinal of the target.
            state: [T, H] float; not read by history.
            width: P.

        Returns:
            ids [T, P] int64 and weights [T, P] float32. Where history has no step of as many
            tokens, ids are -1, which nobody prefetches.

        Raises:
            SpecMoEError: the layer has no network.
        """
        if self.remembers:
            return self._repeat(layer, state, width)
        network = self.networks[layer]
        if network is None:
            raise SpecMoEError(
                f"MoE layer {layer} has no trained network: give default_vectors=FILE, a file of"
                " `specmoe calibrate --train-estimator`"
            )
        return network.predict(state, width)

    def _repeat(self, layer: int, state: Tensor, width: int) -> tuple[Tensor, Tensor]:
        shape, last = (state.shape[0], width), self._last[layer]
        weights = torch.full(shape, 1.0 / width, device=state.device)
        if last is None or last.shape != shape:
            return torch.full(shape, -1, dtype=torch.int64, device=state.device), weights
        return last.clone(), weights
