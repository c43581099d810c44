"""A routing trace: in a file, which experts a model's routers chose, and which were predicted.

The file is safetensors. A *step* is one forward pass, with the same tokens in every MoE layer;
steps of more than MAX_DECODE_TOKENS tokens are prefill and have no predictions.

| tensor | shape, dtype | content |
|---|---|---|
| `tokens` | [N] int32 | tokens T of each step |
| `ids` | [R, L, K] int16 | experts of each row; -1 where a layer has fewer than K |
| `weights` | [R, L, K] float32 | their router weights |
| `split` | [N, L] uint8 | 1 where a layer ran with wait and correction |
| `predicted` | [N, L] uint8 | 1 where a prediction was made |
| `predicted_ids` | [D, L, P] int16 | predicted experts of each row of decode; -1: none |
| `predicted_weights` | [D, L, P] float32 | their router weights |
| `step_ms` | [N] float32 | from this step's first MoE layer to the next step's; 0 for the last |
| `stall_ms`, `read_ms` | [N] float32 | of it: waited for reads; at least one read in progress |
| `read_bytes` | [N] int64 | read meanwhile |

Shape letters: N steps, T tokens of a step, R rows (tokens of all steps), D rows of steps that are
not prefill, L MoE layers, E experts, K top-k, P predicted per token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from specmoe_compile.errors import TraceError
from specmoe_compile.options import MAX_DECODE_TOKENS

FORMAT: Final = "specmoe-routing-trace"
VERSION: Final = 1
_ADVICE = "record one with `specmoe generate MODEL --prompt TEXT --trace FILE`"
_DTYPES: Mapping[str, torch.dtype] = {
    "tokens": torch.int32,
    "ids": torch.int16,
    "weights": torch.float32,
    "split": torch.uint8,
    "predicted": torch.uint8,
    "predicted_ids": torch.int16,
    "predicted_weights": torch.float32,
    "step_ms": torch.float32,
    "stall_ms": torch.float32,
    "read_ms": torch.float32,
    "read_bytes": torch.int64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTrace:
    """What a run's routers did; tensors are those of the module's table.

    Attributes:
        model: the model's name, for people.
        fingerprint: of the expert store that it ran from.
        num_experts: E of each MoE layer.
        record_bytes: bytes of an expert of each MoE layer.
        top_k: K.
        setting: how the run was set: cache slots per layer (0: none) and policy, speculation; and
            what experts are made of (`replay.formats.described`).
        tensors: by name.
    """

    model: str
    fingerprint: str
    num_experts: tuple[int, ...]
    record_bytes: tuple[int, ...]
    top_k: int
    setting: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        problem = _problem_or_none(self)
        if problem is not None:
            raise TraceError(f"the routing trace does not hold together: {problem}; {_ADVICE}")

    @property
    def layers(self) -> int:
        """MoE layers L."""
        return len(self.num_experts)

    @property
    def tokens(self) -> list[int]:
        """Tokens T of each step."""
        tokens: list[int] = self.tensors["tokens"].tolist()
        return tokens

    @property
    def total_bytes(self) -> int:
        """Bytes of all experts of the model."""
        return sum(e * size for e, size in zip(self.num_experts, self.record_bytes, strict=True))

    def decode_steps(self) -> list[int]:
        """Steps that count as decoding: not prefill, and of as few tokens as any step has."""
        tokens = self.tokens
        fewest = min(tokens)
        if fewest > MAX_DECODE_TOKENS:
            return []
        return [step for step, count in enumerate(tokens) if count == fewest]

    def save(self, path: Path) -> None:
        """Write the trace; the file appears complete or not at all."""
        from safetensors.torch import save_file

        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "model": self.model,
            "fingerprint": self.fingerprint,
            "num_experts": json.dumps(self.num_experts),
            "record_bytes": json.dumps(self.record_bytes),
            "top_k": str(self.top_k),
            "setting": json.dumps(dict(self.setting)),
            "sha256": _digest(self.tensors),
        }
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            save_file(dict(self.tensors), temporary, metadata=metadata)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path) -> RoutingTrace:
        """Read a trace.

        Raises:
            TraceError: there is none, or it is damaged, or of another version.
        """
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise TraceError(f"there is no routing trace {path}: {_ADVICE}")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise TraceError(
                        f"{path} is a safetensors file, but not a routing trace: {_ADVICE}"
                    )
                if metadata.get("version") != str(VERSION):
                    raise TraceError(
                        f"{path} is a routing trace of version {metadata.get('version')}, this"
                        f" specmoe reads version {VERSION}: record it again"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if _digest(tensors) != metadata["sha256"]:
                raise TraceError(f"{path} is damaged (its checksum is another): record it again")
            return cls(
                model=metadata["model"],
                fingerprint=metadata["fingerprint"],
                num_experts=tuple(json.loads(metadata["num_experts"])),
                record_bytes=tuple(json.loads(metadata["record_bytes"])),
                top_k=int(metadata["top_k"]),
                setting=json.loads(metadata["setting"]),
                tensors=tensors,
            )
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise TraceError(f"{path} is not a routing trace ({error}): {_ADVICE}") from error

    def check_model(self, fingerprint: str, where: str) -> None:
        """Raise `TraceError` unless the trace is of the model with this fingerprint."""
        if fingerprint != self.fingerprint:
            raise TraceError(
                f"the routing trace is of {self.model} with fingerprint {self.fingerprint[:12]},"
                f" but {where} holds {fingerprint[:12]}: record it again with the model that is"
                " there now"
            )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}{tensors[name].dtype}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _problem_or_none(trace: RoutingTrace) -> str | None:
    """Say what is wrong with a trace's tensors, in words; None if nothing is."""
    tensors = trace.tensors
    for name, dtype in _DTYPES.items():
        if name not in tensors:
            return f"it has no {name}"
        if tensors[name].dtype != dtype:
            return f"{name} is {tensors[name].dtype}, expected {dtype}"
    layers = trace.layers
    if layers < 1 or len(trace.record_bytes) != layers or min(trace.record_bytes) < 1:
        return f"it names {layers} layers and {len(trace.record_bytes)} record sizes"
    tokens = trace.tokens
    if not tokens or min(tokens) < 1:
        return "it has no step, or one without tokens"
    steps, rows = len(tokens), sum(tokens)
    short = sum(count for count in tokens if count <= MAX_DECODE_TOKENS)
    guesses = tensors["predicted_ids"].shape[-1] if tensors["predicted_ids"].dim() == 3 else 0
    wanted = {
        "ids": (rows, layers, trace.top_k),
        "weights": (rows, layers, trace.top_k),
        "split": (steps, layers),
        "predicted": (steps, layers),
        "predicted_ids": (short, layers, guesses),
        "predicted_weights": (short, layers, guesses),
        **dict.fromkeys(("step_ms", "stall_ms", "read_ms", "read_bytes"), (steps,)),
    }
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            return f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}"
    for name in ("ids", "predicted_ids"):
        reason = _range_problem_or_none(name, tensors[name], trace.num_experts)
        if reason is not None:
            return reason
    if bool((tensors["ids"][:, :, 0] < 0).any()):
        return "a row has no experts"
    return None


def _range_problem_or_none(name: str, ids: Tensor, num_experts: Sequence[int]) -> str | None:
    if ids.numel() == 0:
        return None
    highest = ids.amax(dim=(0, 2)).tolist()
    if int(ids.min()) < -1:
        return f"{name} has an expert below -1"
    for layer, (most, experts) in enumerate(zip(highest, num_experts, strict=True)):
        if most >= experts:
            return f"{name} has expert {most} in MoE layer {layer}, which has {experts}"
    return None
