"""Trained predictors as tensors and metadata of a calibration artefact.

Tensors are named `<predictor>.<layer>.<weight>`; a layer without a network has none. Metadata is
JSON: per predictor what `TrainedPredictor.about` says, and the layers' `weight_sum`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from specmoe_compile.predict.network import ExpertNetwork
from specmoe_compile.predict.registry import PREDICTORS, TRAINED
from specmoe_compile.predict.training import (
    Recording,
    TrainingConfig,
    recall_of,
    share_that_fits,
    train_network,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedPredictor:
    """The networks of one predictor, and what they are worth.

    Attributes:
        networks: by MoE layer; None where the layer is not predicted.
        recall, whole: by layer, on text that training never saw; see `recall_of`.
        tokens: tokens trained on. epochs: times that each was seen.
        seconds: of training, on the machine that trained; recording is not in it.
    """

    networks: tuple[ExpertNetwork | None, ...]
    recall: tuple[float | None, ...]
    whole: tuple[float | None, ...]
    tokens: int
    epochs: int
    seconds: float

    @property
    def parameters(self) -> int:
        """Number of weights of all layers."""
        return sum(network.parameters for network in self.networks if network is not None)

    def about(self) -> dict[str, Any]:
        """All but the weights, for JSON."""
        return {
            "recall": list(self.recall),
            "whole": list(self.whole),
            "tokens": self.tokens,
            "epochs": self.epochs,
            "seconds": self.seconds,
            "parameters": self.parameters,
        }


def recordings_for(
    windows: Tensor, vectors: Sequence[Tensor], config: TrainingConfig
) -> tuple[Recording, Recording]:
    """Recordings to train on and to measure on, empty, that fit in memory.

    Args:
        windows: [N, W] to be recorded for training.
        vectors: default vectors [E, H] of each layer.
        config: its seed draws the tokens that are kept of a text that is too long.
    """
    states = len(TRAINED) * len(vectors)
    share = share_that_fits(windows.numel(), states, max(v.shape[1] for v in vectors))
    return Recording(share=share, seed=config.seed), Recording(share=share, seed=config.seed)


def train_all(
    recorded: Recording, measured: Recording, *, experts: Sequence[int], config: TrainingConfig
) -> dict[str, TrainedPredictor]:
    """Train every predictor that can be; arguments are those of `train_predictor`."""
    return {
        name: train_predictor(name, recorded, measured, experts=experts, config=config)
        for name in TRAINED
    }


def train_predictor(
    name: str,
    recorded: Recording,
    measured: Recording,
    *,
    experts: Sequence[int],
    config: TrainingConfig,
) -> TrainedPredictor:
    """Train a predictor's network of every layer that was recorded.

    Args:
        name: of `registry.TRAINED`.
        recorded: to train on. measured: other text, to measure on.
        experts: E of each layer.
        config: how.
    """
    networks: list[ExpertNetwork | None] = [None] * len(experts)
    worth: list[tuple[float | None, float | None]] = [(None, None)] * len(experts)
    is_linear = PREDICTORS[name].state == "pre_attention"
    tokens, seconds = 0, 0.0
    for layer in recorded.layers(name):
        states, (ids, weights) = recorded.states(name, layer), recorded.choices(layer)
        started = time.perf_counter()
        network = train_network(
            states, ids, weights, experts=experts[layer], is_linear=is_linear, config=config
        )
        seconds += time.perf_counter() - started
        networks[layer], tokens = network, len(states)
        worth[layer] = recall_of(network, measured.states(name, layer), measured.choices(layer)[0])
    return TrainedPredictor(
        networks=tuple(networks),
        recall=tuple(recall for recall, _ in worth),
        whole=tuple(whole for _, whole in worth),
        tokens=tokens,
        epochs=config.epochs,
        seconds=seconds,
    )


def pack_trained(trained: Mapping[str, TrainedPredictor]) -> tuple[dict[str, Tensor], str]:
    """The tensors of all networks, and the metadata."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for name, predictor in trained.items():
        sums = [None if n is None else n.weight_sum for n in predictor.networks]
        about[name] = {**predictor.about(), "weight_sums": sums}
        for layer, network in enumerate(predictor.networks):
            if network is not None:
                tensors |= {f"{name}.{layer}.{k}": t for k, t in network.tensors.items()}
    return tensors, json.dumps(about)


def unpack_trained(file: Any, about: str) -> dict[str, TrainedPredictor]:
    """Read what `pack_trained` made.

    Args:
        file: open safetensors file.
        about: the metadata.

    Raises:
        KeyError, TypeError, ValueError: it is damaged.
    """
    names: dict[str, dict[str, str]] = {}
    for key in file.keys():  # noqa: SIM118 - an open safetensors file is no mapping
        prefix, _, weight = key.rpartition(".")
        names.setdefault(prefix, {})[weight] = key
    found = {}
    for name, known in json.loads(about).items():
        networks = tuple(
            None
            if weight_sum is None
            else ExpertNetwork(
                **{w: file.get_tensor(key) for w, key in names[f"{name}.{layer}"].items()},
                weight_sum=weight_sum,
            )
            for layer, weight_sum in enumerate(known["weight_sums"])
        )
        found[name] = TrainedPredictor(
            networks=networks,
            recall=tuple(known["recall"]),
            whole=tuple(known["whole"]),
            tokens=known["tokens"],
            epochs=known["epochs"],
            seconds=known["seconds"],
        )
    return found
