"""Options of `torch.compile(model, backend="specmoe", options={...})`, each declared once.

Every option is one field, with its default; its metadata says its effect, its unit, and what a
default of None means. The class that declares it says who reads it:

- `GraphOptions`: they change the rewritten graph, and make the key of compiled code;
- `SessionOptions`: those, and what a session does with predictions;
- `CompileOptions`: those, and what only the backend reads. This is what a user gives.

A pass or a session gets its view of the options that a user gave: an instance of the class further
up with the same values. An unknown name is an error that lists the valid ones.

Environment variables: `SPECMOE_STRICT=1` is the default of `strict` (the test-suite runs with it).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any, Literal, Self, cast, get_args

from specmoe_compile.predict.registry import AUTO, PREDICTORS, Predictor, without_auto

Policy = Literal["exact", "default_vector", "commit"]
CommitWeights = Literal["predicted", "true"]
Lowering = Literal["inductor", "eager"]
Mode = Literal["default", "reduce-overhead"]
TransferKind = Literal["auto", "copy", "gather"]
CpuMath = Literal["exact", "int8"]
Sums = Literal["auto", "all_reduce", "one_shot"]

MAX_DECODE_TOKENS = 16
"""A step of more tokens is prefill: it leaves decode's slots alone and is always exact."""

AUTO_ONE_SHOT_RANKS = 2
"""With `sums="auto"` so many ranks add up in one shot, as many as were measured; 0 for none."""
AUTO_ONE_SHOT_BYTES = 2
"""And numbers of so many bytes, as were measured."""

# torch.compile modes that only change how Inductor tunes are accepted and mean "default" to us.
_MODE_ALIASES = {"max-autotune-no-cudagraphs": "default", "max-autotune": "reduce-overhead"}


def option(default: Any, effect: str, *, unit: str = "", none: str = "") -> Any:
    """Declare an option.

    Args:
        default: a value, or a function that makes one.
        effect: what it does, as documents say it.
        unit: of a number.
        none: what the default means, where the value does not say it.
    """
    about = {"effect": effect, "unit": unit, "none": none}
    if callable(default):
        return field(default_factory=default, metadata=about)
    return field(default=default, metadata=about)


def _strict_default() -> bool:
    return os.environ.get("SPECMOE_STRICT", "0") == "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphOptions:
    """What changes the rewritten graph."""

    prefetch: bool | Literal["auto"] = option(
        "auto",
        "fetch the next layer's experts before its router has spoken, as the current layer"
        " predicts them; `auto` does where that was not found to cost more than it gains: not on a"
        " CPU with an expert cache ([measured](results/cpu-disk.md)), nor on a GPU whose cache has"
        " slots for half of the experts or more"
        " ([measured](results/peers_gpu.md#prefetching))",
    )
    skip_layers: Literal["auto"] | tuple[int, ...] = option(
        (),
        'MoE layers (0 is the first) that never speculate; `"auto"` leaves out those whose recall'
        " in the file of `default_vectors` is low",
        none="none",
    )
    predictor: str = option(
        AUTO,
        f"what predicts experts: {', '.join(f'`{name}`' for name in PREDICTORS)}; `auto` is"
        " `hybrid` with networks from `specmoe calibrate --train-estimator`, else"
        " `default_vectors` ([compared](results/predictors.md))",
    )
    lookahead: int = option(1, "how many MoE layers ahead to predict", unit="MoE layers")
    prefetch_width: int | None = option(
        None, "experts predicted per token", unit="experts", none="top-k"
    )
    control: bool = option(
        False, "predict from the true router input, for tests: recall must then be 100 %"
    )
    attention: bool = option(
        True,
        "attention of decode steps reads the filled part of a static cache only, keys and values"
        " once for all heads; on a GPU, and on a CPU with the C++ engine",
    )
    products: bool | Literal["auto"] = option(
        "auto",
        "products of decode steps with weights that are not experts' (q, k, v, o, routers) by"
        " specmoe's kernels, all those of one input at once: on a CPU with the engine's threads; on"
        " a GPU those of one token in CUDA graphs",
    )
    share_layers: bool | Literal["auto"] = option(
        "auto",
        "equal layers of a decode step are compiled once and called, if the step's shapes are"
        " fixed; `auto` on a GPU, where it shortens the first start"
        " ([measured](results/log/start.md)); on a CPU it gains nothing",
    )
    sums: Sums = option(
        "auto",
        "how ranks add up their parts of a decode step: `all_reduce` (NCCL, gloo), or `one_shot`,"
        " in one launch that writes into the other GPUs' memory, where all can be reached; `auto`"
        " is `one_shot` of two GPUs in 16 bits, as measured ([how](several_gpus.md#sums))",
    )
    lowering: Lowering = option(
        "inductor", '`"eager"` runs the rewritten graph node by node, for debugging'
    )

    def __post_init__(self) -> None:
        _check_choice("lowering", self.lowering, get_args(Lowering))
        _check_choice("predictor", self.predictor, (AUTO, *PREDICTORS))
        _check_choice("sums", self.sums, get_args(Sums))
        for name in ("prefetch", "products", "share_layers"):
            _check_switch(name, getattr(self, name))
        for name in ("control", "attention"):
            _check_type(name, getattr(self, name), bool)
        _check_integer("lookahead", self.lookahead, minimum=1)
        if self.prefetch_width is not None:
            _check_integer("prefetch_width", self.prefetch_width, minimum=1)
        layers = self.skip_layers
        if layers != "auto" and (
            isinstance(layers, str) or not all(isinstance(i, int) and i >= 0 for i in layers)
        ):
            raise ValueError(
                f"option skip_layers={layers!r} is not valid: give 'auto' or MoE layer numbers"
                " (0 is the first MoE layer)"
            )

    @classmethod
    def view(cls, options: GraphOptions, **changes: Any) -> Self:
        """Take the fields of this class from options that have more of them.

        `skip_layers="auto"`, if no calibration resolved it to layers, skips none;
        `prefetch="auto"`, if no engine resolved it, predicts.
        """
        known = {f.name: getattr(options, f.name) for f in fields(cls) if hasattr(options, f.name)}
        known["prefetch"] = options.predicts
        known["skip_layers"] = () if options.skip_layers == "auto" else options.skip_layers
        return cls(**{**known, **changes})

    @property
    def kind(self) -> Predictor:
        """The predictor; `auto`, if no calibration resolved it, is the one that needs no file."""
        return PREDICTORS[without_auto(self.predictor)]

    @property
    def one_shot_ranks(self) -> int | None:
        """The most ranks that add up in one shot, where they can; None for any number."""
        if self.sums == "auto":
            return AUTO_ONE_SHOT_RANKS
        return None if self.sums == "one_shot" else 0

    @property
    def one_shot_bytes(self) -> int:
        """Bytes of the widest number that is added up in one shot, where that is done."""
        return AUTO_ONE_SHOT_BYTES if self.sums == "auto" else 4

    @property
    def predicts(self) -> bool:
        """Whether experts are predicted; `auto`, if no engine resolved it, means yes."""
        return self.prefetch is not False

    def skips(self, layer: int) -> bool:
        """Whether a MoE layer never speculates."""
        return self.skip_layers != "auto" and layer in self.skip_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions(GraphOptions):
    """What a session does with predictions; the graph is the same for all values."""

    policy: Policy = option(
        "exact",
        "what a miss gets: `exact` keeps the model's tokens; `default_vector` and `commit`"
        " approximate",
    )
    default_vector_threshold: float = option(
        0.1,
        "router weight below which a miss gets its default vector (policy `default_vector`)",
        unit="0 to 1",
    )
    commit_weights: CommitWeights = option(
        "predicted",
        "router weights of policy `commit`: `predicted`, or the `true` ones renormalised",
    )
    prefetch_budget_bytes: int | None = option(
        None,
        "most bytes fetched ahead per layer",
        unit="bytes",
        none="unlimited; with `gather` what `auto_off` finds, and one expert without it",
    )
    auto_off: bool = option(
        True,
        "fetch ahead only what pays, by measurement: on the CPU it turns unsure guesses off that"
        " are wrong more often than right; on a GPU with `gather` it finds how many"
        " experts, with `copy` whether at all",
    )
    transfer: TransferKind = option(
        "auto",
        "how a GPU gets experts: `copy` by its copy engine, `gather` by itself (needed for CUDA"
        " graphs); `auto` measures both once",
    )
    cpu_math: CpuMath = option(
        "exact",
        "`int8` on a CPU: integer codes (`quantize=`, MXFP4) times activations rounded to 8 bits in"
        " blocks of 32; approximate",
    )
    mode: Mode = option("default", '`"reduce-overhead"` means CUDA graphs, as elsewhere')
    nvtx: bool = option(
        False, "annotate layers and phases with NVTX ranges; on by itself under Nsight"
    )

    def __post_init__(self) -> None:
        GraphOptions.__post_init__(self)  # slots leave no super() without arguments
        _check_choice("policy", self.policy, get_args(Policy))
        _check_choice("commit_weights", self.commit_weights, get_args(CommitWeights))
        _check_choice("mode", self.mode, get_args(Mode))
        _check_choice("cpu_math", self.cpu_math, get_args(CpuMath))
        _check_choice("transfer", self.transfer, get_args(TransferKind))
        for name in ("auto_off", "nvtx"):
            _check_type(name, getattr(self, name), bool)
        _check_number(
            "default_vector_threshold", self.default_vector_threshold, minimum=0.0, maximum=1.0
        )
        if self.prefetch_budget_bytes is not None:
            _check_integer("prefetch_budget_bytes", self.prefetch_budget_bytes, minimum=0)
        if self.transfer == "copy" and self.captures:
            raise ValueError(
                "option transfer='copy' reads expert ids on the host, which the CUDA graphs of"
                " mode='reduce-overhead' cannot hold: use transfer='gather' or another mode"
            )

    @property
    def captures(self) -> bool:
        """Whether decode steps are captured in CUDA graphs."""
        return self.mode == "reduce-overhead"

    def as_dict(self) -> dict[str, Any]:
        """Names and values, for JSON and traces."""
        return {**asdict(self), "captures": self.captures}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions(SessionOptions):
    """How a graph is rewritten, lowered and run: all options."""

    default_vectors: str | None = option(
        None,
        "file of calibrated default vectors; without one they are learned while running",
        none="learned",
    )
    compile_prefill: bool = option(
        False,
        "let Inductor compile prompts as well; without it they run as the model is, or as traced"
        " (more than 16 tokens, without a static cache), and less is compiled at the start",
    )
    strict: bool = option(
        _strict_default,
        "raise where specmoe would leave a graph to Inductor untouched (`SPECMOE_STRICT=1`)",
        none="`False`",
    )

    def __post_init__(self) -> None:
        SessionOptions.__post_init__(self)
        for name in ("compile_prefill", "strict"):
            _check_type(name, getattr(self, name), bool)
        if self.default_vectors is not None:
            _check_type("default_vectors", self.default_vectors, str)
        self._check_predictor()
        if self.policy != "exact" and not self.predicts:
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

    @property
    def asks_for_predictions(self) -> bool:
        """Whether another option than `prefetch` asks for predictions, which `auto` then makes."""
        return (
            self.policy != "exact"
            or self.control
            or self.predictor != AUTO
            or self.lookahead > 1
            or self.prefetch_width is not None
            or self.prefetch_budget_bytes is not None
            or self.default_vectors is not None
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
                hint = f"; did you mean {close[0]!r}?" if close else "."
                raise ValueError(
                    f"unknown specmoe option {name!r}{hint} Valid options: {', '.join(names)}."
                )
        if mode is not None:
            given.setdefault("mode", _MODE_ALIASES.get(mode, mode))
        layers = given.get("skip_layers")
        if isinstance(layers, list | set | frozenset | range):
            given["skip_layers"] = tuple(sorted(layers))
        return cls(**given)


def option_table() -> str:
    """The options as a table in Markdown, which the documents hold."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for declared in fields(CompileOptions):
        about = declared.metadata
        unit = "" if about["unit"] in about["effect"] else f" ({about['unit']})"
        lines.append(f"| `{declared.name}` | {_default(declared)} | {about['effect']}{unit} |")
    return "\n".join(lines)


def _default(declared: Field[Any]) -> str:
    if declared.metadata["none"]:
        return str(declared.metadata["none"])
    assert declared.default is not MISSING, f"{declared.name} says what its default is"
    value = declared.default
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"option {name}={value!r} is not valid: choose {' or '.join(choices)}")


def _check_type(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(
            f"option {name}={value!r} is not valid: expected {kind.__name__},"
            f" got {type(value).__name__}"
        )


def _check_switch(name: str, value: object) -> None:
    if not (isinstance(value, bool) or (isinstance(value, str) and value == "auto")):
        raise ValueError(f"option {name}={value!r} is not valid: give True, False or 'auto'")


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
