"""Calibration: default vectors, and what predictions are worth, computed from text, in a file.

The artefact is a safetensors file: `default_vectors.{l}` [E, H] float32 and `samples.{l}` [E] int64
per MoE layer, and as metadata its version, the fingerprint of the experts it was computed from, the
number of tokens, and recall and cosine per layer.

Shape letters: N windows, W tokens per window, E experts, K top-k, H hidden, L MoE layers.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specmoe_compile.errors import CalibrationError
from specmoe_compile.layer_probe import LayerMeasure, LayerProbe
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
    ones those without (the experts' output left out). None: the layer is not predicted.
    """

    recall: float | None
    cosine: float | None
    residual_recall: float | None
    residual_cosine: float | None
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
    """

    fingerprint: str
    default_vectors: tuple[Tensor, ...]
    samples: tuple[Tensor, ...]
    layers: tuple[LayerWorth, ...]
    tokens: int
    measured_tokens: int
    model: str

    def save(self, path: Path) -> None:
        """Write the artefact; the file appears complete or not at all."""
        from safetensors.torch import save_file

        tensors = {f"default_vectors.{i}": v for i, v in enumerate(self.default_vectors)}
        tensors |= {f"samples.{i}": v for i, v in enumerate(self.samples)}
        metadata = {
            "format": _FORMAT,
            "version": str(VERSION),
            "fingerprint": self.fingerprint,
            "model": self.model,
            "tokens": str(self.tokens),
            "measured_tokens": str(self.measured_tokens),
            "layers": json.dumps([asdict(layer) for layer in self.layers]),
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

    def poor_layers(self, policy: Literal["exact", "default_vector", "commit"]) -> tuple[int, ...]:
        """MoE layers whose recall is below `MIN_RECALL` of a policy: `skip_layers="auto"`."""
        return tuple(
            index
            for index, layer in enumerate(self.layers)
            if layer.recall is not None and layer.recall < MIN_RECALL[policy]
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
    on_progress: Callable[[int], Any] | None = None,
) -> Calibration:
    """Compute default vectors from text, and measure what predictions with them are worth.

    Args:
        model: offloaded model.
        windows: [N, W] int64 token ids that the vectors are computed from.
        name: the model's name, for people.
        held_out: [M, W] int64 other token ids, that recall and cosine are measured on.
        batch: windows per forward pass.
        on_progress: called with the number of windows done, after each batch; N + 2 M in total.

    Returns:
        The artefact.

    Raises:
        CalibrationError: there is no text, or the model's graph cannot be rewritten.
    """
    from specmoe_compile.generation import session_of

    if not windows.numel() or not held_out.numel():
        raise CalibrationError("there is no text to calibrate on: give windows of at least 1 token")
    session = session_of(model)
    probe = LayerProbe(model, session)

    def run(part: Tensor) -> list[LayerMeasure]:
        probe.reset()
        for start in range(0, len(part), batch):
            chunk = part[start : start + batch]
            probe.run(chunk)
            if on_progress is not None:
                on_progress(len(chunk))
        return probe.layers

    run(windows)
    means, samples = probe.means(), tuple(count.clone() for count in probe.counts)
    probe.learns = False
    without = run(held_out)
    probe.vectors = means
    layers = run(held_out)
    return Calibration(
        fingerprint=fingerprint(session),
        default_vectors=tuple(means),
        samples=samples,
        layers=tuple(_worth(a, b) for a, b in zip(layers, without, strict=True)),
        tokens=windows.numel(),
        measured_tokens=held_out.numel(),
        model=name,
    )


def _worth(layer: LayerMeasure, without: LayerMeasure) -> LayerWorth:
    return LayerWorth(
        recall=layer.recall,
        cosine=layer.cosine,
        residual_recall=without.recall,
        residual_cosine=without.cosine,
        reason=layer.reason,
    )


def use_calibration(session: Session, path: str | Path) -> Calibration:
    """Give a session the default vectors of an artefact; it stops learning its own.

    Raises:
        CalibrationError: the artefact cannot be read, or belongs to another model.
    """
    calibration = Calibration.load(path)
    calibration.check(session, path=path)
    session.default_vectors.load(calibration.default_vectors)
    return calibration
