"""Options of `torch.compile(model, backend="specmoe", options={...})`.

Every option is one field of `CompileOptions`; an unknown name is an error listing the valid ones.
Environment variables are read here and nowhere else:

- `SPECMOE_STRICT=1`: the default of `strict` (the test-suite runs with it).
- `NSYS_PROFILING_SESSION_ID`, `NVTX_INJECTION64_PATH`: set by Nsight in what it profiles; NVTX
  ranges are on then.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

from specmoe_compile.predict.registry import AUTO, DEFAULT_PREDICTOR, PREDICTORS, without_auto

Policy = Literal["exact", "default_vector", "commit"]
CommitWeights = Literal["predicted", "true"]
Lowering = Literal["inductor", "eager"]
Mode = Literal["default", "reduce-overhead"]
TransferKind = Literal["auto", "copy", "gather"]
CpuMath = Literal["exact", "int8"]

MAX_DECODE_TOKENS = 16
"""A step of more tokens is prefill: it leaves decode's slots alone and is always exact."""

_POLICIES = ("exact", "default_vector", "commit")
_COMMIT_WEIGHTS = ("predicted", "true")
_LOWERINGS = ("inductor", "eager")
_MODES = ("default", "reduce-overhead")
_SWITCHES = ("prefetch", "auto_off", "control", "attention", "compile_prefill")
_TRANSFERS = ("auto", "copy", "gather")
_CPU_MATHS = ("exact", "int8")
# torch.compile modes that only change how Inductor tunes are accepted and mean "default" to us.
_MODE_ALIASES = {"max-autotune-no-cudagraphs": "default", "max-autotune": "reduce-overhead"}


def _strict_default() -> bool:
    return os.environ.get("SPECMOE_STRICT", "0") == "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions:
    """How a graph is rewritten, lowered and run.

    Fields marked "graph" change the compiled code and are part of the FX graph cache's key.
    """

    prefetch: bool = True
    """graph: speculate on the next layer's experts (offloaded models only)."""
    policy: Policy = "exact"
    """graph: what a miss gets; `exact` keeps the model's tokens, the others approximate."""
    default_vector_threshold: float = 0.1
    """router weight (0..1) below which a miss gets its default vector, policy `default_vector`."""
    commit_weights: CommitWeights = "predicted"
    """router weights of policy `commit`: the predicted ones, or the true ones renormalised."""
    skip_layers: Literal["auto"] | tuple[int, ...] = ()
    """graph: MoE layers (ordinals) that never speculate; `auto` chooses by measured recall."""
    predictor: str = AUTO
    """graph: what predicts experts, a name of `predictors.registry.PREDICTORS`; `auto` is `hybrid`
    where `default_vectors` names a file with trained networks, else `default_vectors`."""
    lookahead: int = 1
    """graph: how many MoE layers ahead the lookahead router predicts (>= 1)."""
    prefetch_width: int | None = None
    """experts predicted per token; None is the model's top-k."""
    prefetch_budget_bytes: int | None = None
    """most bytes fetched ahead per layer; None: no limit, with `transfer="gather"` what `auto_off`
    finds, and one expert without it."""
    auto_off: bool = True
    """fetch ahead only what pays, by measurement: on the CPU it turns layers, unsure guesses and
    all of it off; on a GPU it chooses how many experts with `transfer="gather"`, and all or none
    with `copy`."""
    default_vectors: str | None = None
    """path of a `specmoe calibrate` artefact; None learns default vectors online."""
    control: bool = False
    """graph: feed the lookahead with the true router input; recall must then read 100 %."""
    mode: Mode = "default"
    """graph: `reduce-overhead` captures the decode step as a CUDA graph."""
    transfer: TransferKind = "auto"
    """how a GPU gets the experts of a decode step: `copy` by the copy engine, with ids that the
    host reads; `gather` by the GPU itself, the only one that CUDA graphs can hold; `auto` measures
    both once and takes the faster, or `gather` with CUDA graphs. `auto` alone on the CPU."""
    cpu_math: CpuMath = "exact"
    """what a CPU multiplies 4- and 8-bit integer codes with in decode: `exact` the activations in
    float32, `int8` the activations rounded to 8 bits in blocks of 32, which approximates."""
    attention: bool = True
    """graph: on a GPU the attention of a decode step reads the filled part of a static cache, once
    for all heads that share its keys, instead of all of it, repeated."""
    compile_prefill: bool = False
    """graph: let Inductor compile steps of more than 16 tokens too; they run as traced otherwise,
    which takes half the time to start, and no longer to run."""
    lowering: Lowering = "inductor"
    """graph: `eager` runs the rewritten graph node by node, for debugging."""
    strict: bool = field(default_factory=_strict_default)
    """raise where specmoe would fall back to the untouched graph."""
    nvtx: bool = False
    """annotate layers and phases with NVTX ranges; on by itself under Nsight."""

    def __post_init__(self) -> None:
        _check_choice("policy", self.policy, _POLICIES)
        _check_choice("commit_weights", self.commit_weights, _COMMIT_WEIGHTS)
        _check_choice("lowering", self.lowering, _LOWERINGS)
        _check_choice("mode", self.mode, _MODES)
        _check_choice("transfer", self.transfer, _TRANSFERS)
        _check_choice("cpu_math", self.cpu_math, _CPU_MATHS)
        _check_choice("predictor", self.predictor, (AUTO, *PREDICTORS))
        for name in (
            "prefetch",
            "auto_off",
            "control",
            "attention",
            "compile_prefill",
            "strict",
            "nvtx",
        ):
            _check_type(name, getattr(self, name), bool)
        _check_number(
            "default_vector_threshold", self.default_vector_threshold, minimum=0.0, maximum=1.0
        )
        _check_integer("lookahead", self.lookahead, minimum=1)
        if self.prefetch_width is not None:
            _check_integer("prefetch_width", self.prefetch_width, minimum=1)
        if self.prefetch_budget_bytes is not None:
            _check_integer("prefetch_budget_bytes", self.prefetch_budget_bytes, minimum=0)
        if self.skip_layers != "auto":
            layers = self.skip_layers
            if isinstance(layers, str) or not all(isinstance(i, int) and i >= 0 for i in layers):
                raise ValueError(
                    f"option skip_layers={layers!r} is not valid: give 'auto' or MoE layer numbers"
                    " (0 is the first MoE layer)"
                )
        if self.default_vectors is not None:
            _check_type("default_vectors", self.default_vectors, str)
        if self.transfer == "copy" and self.mode == "reduce-overhead":
            raise ValueError(
                "option transfer='copy' reads expert ids on the host, which the CUDA graphs of"
                " mode='reduce-overhead' cannot hold: use transfer='gather' or another mode"
            )
        self._check_predictor()
        if self.policy != "exact" and not self.prefetch:
            raise ValueError(
                f"option policy={self.policy!r} needs prefetch=True: without a prediction there is"
                " nothing to commit to or to leave out; drop prefetch=False or use policy='exact'"
            )

    def _check_predictor(self) -> None:
        if self.predictor == AUTO:
            return
        predictor = PREDICTORS[self.predictor]
        if predictor.needs_networks and self.default_vectors is None:
            raise ValueError(
                f"option predictor={self.predictor!r} needs default_vectors=FILE, a file of"
                " `specmoe calibrate --train-estimator`: trained networks come from there"
            )
        if predictor.needs_networks and self.lookahead != 1:
            raise ValueError(
                f"option predictor={self.predictor!r} is trained for the next layer and needs"
                f" lookahead=1, got {self.lookahead}"
            )
        if predictor.source == "history" and self.policy == "commit":
            raise ValueError(
                f"option predictor={self.predictor!r} predicts no router weights, which"
                " policy='commit' executes: use another predictor or policy"
            )

    @classmethod
    def from_kwargs(
        cls, options: Mapping[str, Any] | None = None, mode: str | None = None
    ) -> CompileOptions:
        """Build options from what `torch.compile` passes on.

        Raises:
            ValueError: an unknown option or a value that is not valid.
        """
        given = dict(options or {})
        names = [f.name for f in fields(cls)]
        for name in given:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(
                    f"unknown specmoe option {name!r}{hint} Valid options: {', '.join(names)}"
                )
        if mode is not None:
            given.setdefault("mode", _MODE_ALIASES.get(mode, mode))
        layers = given.get("skip_layers")
        if isinstance(layers, list | set | frozenset | range):
            given["skip_layers"] = tuple(sorted(layers))
        return cls(**given)

    def graph_key(self) -> str:
        """Hash of the fields that change the compiled code."""
        parts = (
            self.prefetch,
            self.policy,
            self.skip_layers,
            self.predictor,
            self.lookahead,
            self.control,
            self.mode,
            self.attention,
            self.compile_prefill,
            self.lowering,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    """What a session does with predictions; see the fields of `CompileOptions`."""

    prefetch: bool = True
    """whether graphs predict at all; without, decoding learns no default vectors."""
    policy: Literal["exact", "default_vector", "commit"] = "exact"
    """what a miss gets."""
    default_vector_threshold: float = 0.1
    """router weight (0..1) below which a miss gets its default vector."""
    commit_weights: Literal["predicted", "true"] = "predicted"
    """router weights of policy `commit`."""
    prefetch_width: int | None = None
    """experts prefetched per token, at most as many as are predicted; None: all of them."""
    prefetch_budget_bytes: int | None = None
    """most bytes per prefetch of a layer; None: no limit, with transfer `gather` what `auto_off`
    finds, and one record without it."""
    auto_off: bool = True
    """fetch ahead only what pays, by measurement: turns layers, unsure guesses and all of it off on
    the CPU, chooses the number of records on a GPU with transfer `gather`, all or none with `copy`.
    """
    skip_layers: tuple[int, ...] = ()
    """MoE layers that never speculate."""
    predictor: str = DEFAULT_PREDICTOR
    """what predicts experts; a name of `PREDICTORS`."""
    lookahead: int = 1
    """MoE layers between a prediction and its use."""
    transfer: Literal["auto", "copy", "gather"] = "auto"
    """how a GPU gets the experts of a decode step."""
    captures: bool = False
    """steps are captured in CUDA graphs."""
    cpu_math: Literal["exact", "int8"] = "exact"
    """what a CPU multiplies integer codes with."""
    nvtx: bool = False
    """annotate phases with NVTX ranges."""

    @classmethod
    def from_options(cls, options: CompileOptions) -> SpeculationConfig:
        """Take the run-time fields of a compile's options; `skip_layers="auto"` skips none here."""
        skip = options.skip_layers if isinstance(options.skip_layers, tuple) else ()
        return cls(
            prefetch=options.prefetch,
            policy=options.policy,
            default_vector_threshold=options.default_vector_threshold,
            commit_weights=options.commit_weights,
            prefetch_width=options.prefetch_width,
            prefetch_budget_bytes=options.prefetch_budget_bytes,
            auto_off=options.auto_off,
            skip_layers=skip,
            predictor=without_auto(options.predictor),
            lookahead=options.lookahead,
            transfer=options.transfer,
            captures=options.mode == "reduce-overhead",
            cpu_math=options.cpu_math,
            nvtx=options.nvtx,
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"option {name}={value!r} is not valid: choose {' or '.join(choices)}")


def _check_type(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(
            f"option {name}={value!r} is not valid: expected {kind.__name__},"
            f" got {type(value).__name__}"
        )


def _check_integer(name: str, value: object, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"option {name}={value!r} is not valid: give an integer >= {minimum}")


def _check_number(name: str, value: object, *, minimum: float, maximum: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"option {name}={value!r} is not valid: give a number")
    if not minimum <= cast(float, value) <= maximum:
        raise ValueError(
            f"option {name}={value!r} is not valid: give a number from {minimum:g} to {maximum:g}"
        )
