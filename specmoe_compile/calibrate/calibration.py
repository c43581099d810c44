"""Calibration: default vectors, and what predictions are worth, computed from text, in a file.

The artefact is a safetensors file: `default_vectors.{l}` [E, H] float32 and `samples.{l}` [E] int64
per MoE layer, the weights of trained predictors (`predictors.artefact`), and as metadata its
version, the fingerprint of the experts it was computed from, the number of tokens, and recall and
cosine per layer.

Shape letters: N windows, W tokens per window, E experts, K top-k, H hidden, L MoE layers.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specmoe_compile.calibrate.layer_probe import LayerMeasure, LayerProbe
from specmoe_compile.errors import CalibrationError
from specmoe_compile.predict.artefact import (
    TrainedPredictor,
    pack_trained,
    recordings_for,
    train_all,
    unpack_trained,
)
from specmoe_compile.predict.registry import AUTO, DEFAULT_PREDICTOR, PREDICTORS
from specmoe_compile.predict.training import Recording, TrainingConfig
from specmoe_compile.runtime.session import Session

VERSION = 1
MIN_RECALL: dict[str, float] = {"exact": 0.3, "default_vector": 0.3, "commit": 0.8}
"""Layers below are left out by `skip_layers="auto"`: a wrong read costs bytes under the first two
policies, and the output itself under `commit`."""

_SAMPLED_VALUES = 256
_FORMAT = "specmoe-calibration"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWorth:
    """What predictions of one MoE layer were worth on text that default vectors never saw.

    `recall` and `cosine` are those of the quasi-hidden state with default vectors, the `residual_`
    ones those without (the experts' output left out), the `previous_` ones those of the experts
    that the token before chose. `whole` is the share of tokens of which all experts were predicted.
    None: the layer is not predicted, or an older version did not measure.
    """

    recall: float | None
    cosine: float | None
    residual_recall: float | None
    residual_cosine: float | None
    whole: float | None = None
    residual_whole: float | None = None
    previous_recall: float | None = None
    previous_whole: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A calibration artefact.

    Attributes:
        fingerprint: of the experts it was computed from.
        default_vectors: [E, H] float32 of each MoE layer.
        samples: [E] int64 of each MoE layer; outputs that each vector is the mean of.
        layers: worth of each MoE layer's predictions.
        tokens: tokens that the vectors were computed from.
        measured_tokens: other tokens, that `layers` was measured on.
        model: the model's name, for people.
        trained: predictors that were trained, by name.
    """

    fingerprint: str
    default_vectors: tuple[Tensor, ...]
    samples: tuple[Tensor, ...]
    layers: tuple[LayerWorth, ...]
    tokens: int
    measured_tokens: int
    model: str
    trained: Mapping[str, TrainedPredictor] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the artefact; the file appears complete or not at all."""
        from safetensors.torch import save_file

        tensors = {f"default_vectors.{i}": v for i, v in enumerate(self.default_vectors)}
        tensors |= {f"samples.{i}": v for i, v in enumerate(self.samples)}
        networks, about = pack_trained(self.trained)
        tensors |= networks
        metadata = {
            "format": _FORMAT,
            "version": str(VERSION),
            "fingerprint": self.fingerprint,
            "model": self.model,
            "tokens": str(self.tokens),
            "measured_tokens": str(self.measured_tokens),
            "layers": json.dumps([asdict(layer) for layer in self.layers]),
            "trained": about,
        }
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            save_file(tensors, temporary, metadata=metadata)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read an artefact.

        Raises:
            CalibrationError: there is none, or it is damaged, or of another version.
        """
        from safetensors import SafetensorError, safe_open

        advice = "run `specmoe calibrate MODEL --text FILE --out FILE` to make one"
        if not Path(path).is_file():
            raise CalibrationError(f"there is no calibration file {path}: {advice}")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise CalibrationError(
                        f"{path} is a safetensors file, but not a calibration: {advice}"
                    )
                if metadata.get("version") != str(VERSION):
                    raise CalibrationError(
                        f"{path} is a calibration of version {metadata.get('version')}, this"
                        f" specmoe reads version {VERSION}: calibrate again"
                    )
                worth = [LayerWorth(**layer) for layer in json.loads(metadata["layers"])]
                numbers = range(len(worth))
                return cls(
                    fingerprint=metadata["fingerprint"],
                    default_vectors=tuple(file.get_tensor(f"default_vectors.{i}") for i in numbers),
                    samples=tuple(file.get_tensor(f"samples.{i}") for i in numbers),
                    layers=tuple(worth),
                    tokens=int(metadata["tokens"]),
                    measured_tokens=int(metadata["measured_tokens"]),
                    model=metadata["model"],
                    trained=unpack_trained(file, metadata.get("trained", "{}")),
                )
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"{path} is not a readable calibration: {error}") from error

    def check(self, session: Session, *, path: str | Path = "this calibration") -> None:
        """Raise unless the artefact was computed from this session's experts.

        Raises:
            CalibrationError: it belongs to another model, or to other weights of this one.
        """
        wanted = [tuple(table.shape) for table in session.default_vectors.tables]
        got = [tuple(table.shape) for table in self.default_vectors]
        if wanted != got:
            raise CalibrationError(
                f"{path} was computed from {self.model}, with {_shapes(got)}; this model has"
                f" {_shapes(wanted)}: calibrate this model"
            )
        if self.fingerprint != fingerprint(session):
            raise CalibrationError(
                f"{path} is stale: it was computed from {self.model} when its experts had other"
                f" weights (fingerprint {self.fingerprint[:12]}, now {fingerprint(session)[:12]}):"
                " calibrate again"
            )

    def resolved(self, predictor: str, *, lookahead: int) -> str:
        """The predictor that `auto` stands for; any other name as it is.

        Networks are trained for the next layer: with a longer lookahead they are left alone.
        """
        if predictor != AUTO:
            return predictor
        return "hybrid" if "estimator" in self.trained and lookahead == 1 else DEFAULT_PREDICTOR

    def recall_of(self, predictor: str) -> tuple[float | None, ...]:
        """Recall of each layer by a predictor; None where it was not measured.

        Raises:
            CalibrationError: the predictor was not trained.
        """
        kind = PREDICTORS[predictor]
        if kind.source == "history":
            return tuple(layer.previous_recall for layer in self.layers)
        if kind.source == "network":
            return self.trained_or_raise(predictor).recall
        if kind.state == "residual":
            return tuple(layer.residual_recall for layer in self.layers)
        chosen = self.network_layers(predictor)
        better = self.trained_or_raise("estimator").recall if chosen else ()
        return tuple(
            better[index] if index in chosen else layer.recall
            for index, layer in enumerate(self.layers)
        )

    def network_layers(self, predictor: str) -> tuple[int, ...]:
        """Layers that a hybrid predictor predicts with the estimator: where its recall is higher.

        Raises:
            CalibrationError: the predictor needs networks, and they were not trained.
        """
        if not PREDICTORS[predictor].hybrid:
            return ()
        networks = self.trained_or_raise("estimator").recall
        return tuple(
            index
            for index, (layer, recall) in enumerate(zip(self.layers, networks, strict=True))
            if recall is not None and layer.recall is not None and recall > layer.recall
        )

    def trained_or_raise(self, predictor: str) -> TrainedPredictor:
        """The networks of a predictor.

        Raises:
            CalibrationError: there are none.
        """
        if predictor not in self.trained:
            raise CalibrationError(
                f"this calibration of {self.model} holds no trained predictor {predictor!r}: run"
                " `specmoe calibrate MODEL --text FILE --out FILE --train-estimator`"
            )
        return self.trained[predictor]

    def poor_layers(
        self,
        policy: Literal["exact", "default_vector", "commit"],
        predictor: str = DEFAULT_PREDICTOR,
    ) -> tuple[int, ...]:
        """MoE layers whose recall is below `MIN_RECALL` of a policy: `skip_layers="auto"`."""
        return tuple(
            index
            for index, recall in enumerate(self.recall_of(predictor))
            if recall is not None and recall < MIN_RECALL[policy]
        )


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    if not shapes:
        return "no MoE layers"
    experts, hidden = shapes[0]
    return f"{len(shapes)} MoE layers of {experts} experts and hidden size {hidden}"


_fingerprints: weakref.WeakKeyDictionary[Session, str] = weakref.WeakKeyDictionary()


def fingerprint(session: Session) -> str:
    """Name the experts of a session: shapes, and samples of the first, middle and last layer.

    Values are rounded to bfloat16 first, so that a model has one name in float32 and bfloat16.
    """
    known = _fingerprints.get(session)
    if known is not None:
        return known
    store = session.store
    digest = hashlib.sha256(repr((store.num_experts, session.top_k)).encode())
    count = len(store.layouts)
    for layer in sorted({0, count // 2, count - 1}):
        layout = store.layouts[layer]
        record = torch.empty(layout.record_bytes, dtype=torch.uint8)
        store.read_into(layer, 0, record)
        for name, tensor in layout.views(record).items():
            flat = tensor.reshape(-1)
            step = max(1, flat.numel() // _SAMPLED_VALUES)
            sample = flat[::step].to(torch.bfloat16).view(torch.int16)
            digest.update(repr((layer, name, tuple(tensor.shape))).encode())
            digest.update(sample.numpy().tobytes())
    _fingerprints[session] = digest.hexdigest()
    return _fingerprints[session]


def calibrate(
    model: nn.Module,
    windows: Tensor,
    *,
    name: str,
    held_out: Tensor,
    batch: int = 1,
    training: TrainingConfig | None = None,
    on_progress: Callable[[int], Any] | None = None,
) -> Calibration:
    """Compute default vectors from text, and measure what predictions with them are worth.

    Args:
        model: offloaded model.
        windows: [N, W] int64 token ids that the vectors are computed from.
        name: the model's name, for people.
        held_out: [M, W] int64 other token ids, that recall and cosine are measured on.
        batch: windows per forward pass.
        training: train predictors too, which reads `windows` once more.
        on_progress: called with the number of windows done, after each batch; N + 2 M in total, and
            N more with `training`.

    Returns:
        The artefact.

    Raises:
        CalibrationError: there is no text, or the model's graph cannot be rewritten.
    """
    from specmoe_compile.hf.attach import session_of

    if not windows.numel() or not held_out.numel():
        raise CalibrationError("there is no text to calibrate on: give windows of at least 1 token")
    session = session_of(model)
    probe = LayerProbe(model, session)

    def run(part: Tensor, recording: Recording | None = None) -> list[LayerMeasure]:
        probe.reset()
        probe.recording = recording
        for start in range(0, len(part), batch):
            chunk = part[start : start + batch]
            probe.run(chunk)
            if on_progress is not None:
                on_progress(len(chunk))
        return probe.layers

    run(windows)
    means, samples = probe.means(), tuple(count.to("cpu", copy=True) for count in probe.counts)
    probe.learns = False
    without = run(held_out)
    probe.vectors = means
    recordings = None if training is None else recordings_for(windows, means, training)
    if recordings is not None:
        run(windows, recordings[0])
    layers = run(held_out, None if recordings is None else recordings[1])
    return Calibration(
        fingerprint=fingerprint(session),
        default_vectors=tuple(mean.cpu() for mean in means),
        samples=samples,
        layers=tuple(_worth(a, b) for a, b in zip(layers, without, strict=True)),
        tokens=windows.numel(),
        measured_tokens=held_out.numel(),
        model=name,
        trained=(
            train_all(*recordings, experts=[len(mean) for mean in means], config=training)
            if training is not None and recordings is not None
            else {}
        ),
    )


def _worth(layer: LayerMeasure, without: LayerMeasure) -> LayerWorth:
    return LayerWorth(
        recall=layer.recall,
        cosine=layer.cosine,
        residual_recall=without.recall,
        residual_cosine=without.cosine,
        whole=layer.whole,
        residual_whole=without.whole,
        previous_recall=layer.previous.recall if layer.previous is not None else None,
        previous_whole=layer.previous.whole if layer.previous is not None else None,
        reason=layer.reason,
    )


def use_networks(session: Session, calibration: Calibration, predictor: str) -> None:
    """Give a session the networks that a predictor needs, if it needs any.

    Raises:
        CalibrationError: the calibration has none.
    """
    kind = PREDICTORS[predictor]
    if kind.needs_networks:
        trained = calibration.trained_or_raise("estimator" if kind.hybrid else predictor)
        session.predictions.load(trained.networks, session.device)
