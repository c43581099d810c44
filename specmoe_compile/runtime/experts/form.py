"""What the experts of a model look like to the kernels: layout of their weights, and their gate.

Shape letters: E experts, S slots, H hidden, I expert intermediate.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from specmoe_compile.errors import UnsupportedModelError
from specmoe_compile.runtime.experts.formats.expert_format import (
    PLAIN_FORMAT,
    ExpertFormat,
    ExpertTensors,
)
from specmoe_compile.runtime.experts.formats.weight_code import (
    PLAIN,
    WeightCode,
    WeightPlanes,
    dequantise,
)

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertForm:
    """Layout and gate of one layer's experts; the variants that transformers' interface declares.

    Attributes:
        has_gate: the up projection yields gate and up, else the activation acts on it alone.
        interleaved: outputs alternate gate, up, gate, up; else all gates come first.
        transposed: weights are [inputs, outputs]; else [outputs, inputs].
        activation: one of `ACTIVATIONS`; "swiglu_oai" is (up + 1) * gate * sigmoid(alpha * gate).
        alpha: of "swiglu_oai" only.
        limit: gate <= limit and |up| <= limit; infinity for none.
        limit_after: the gate's limit applies after its activation instead of before.
        format: how weights are coded; where any is, none is transposed.
    """

    has_gate: bool = True
    interleaved: bool = False
    transposed: bool = False
    activation: str = "silu"
    alpha: float = 1.0
    limit: float = math.inf
    limit_after: bool = False
    format: ExpertFormat = PLAIN_FORMAT

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}"
            )
        if not self.limit > 0:
            raise ValueError(f"limit is {self.limit}, expected a positive number")
        needs_gate = self.activation == "swiglu_oai" or self.interleaved or self.is_limited
        if needs_gate and not self.has_gate:
            raise ValueError("swiglu_oai, interleaved outputs and a limit need experts with a gate")
        if self.transposed and not self.format.is_plain:
            raise ValueError("coded weights are row-major, expected transposed=False with them")

    @property
    def is_limited(self) -> bool:
        return math.isfinite(self.limit)

    def up_rows(self, intermediate: int) -> int:
        """Outputs of the up projection: 2I or I."""
        return 2 * intermediate if self.has_gate else intermediate

    def with_format(self, format: ExpertFormat) -> ExpertForm:
        """The same computation on weights that are coded in another way."""
        return replace(self, format=format, transposed=self.transposed and format.is_plain)

    def as_args(self) -> tuple[bool | str | float, ...]:
        """The last arguments of the ops of `specmoe_kernels`, in their order."""
        values = (getattr(self, name) for name in _PLAIN_ARGS)
        return (*values, _code_text(self.format.up), _code_text(self.format.down))

    @classmethod
    def from_args(cls, args: Sequence[Any]) -> Self:
        """The form that `as_args` wrote."""
        *values, up, down = args
        plain = dict(zip(_PLAIN_ARGS, values, strict=True))
        return cls(**plain, format=_format_of_texts(up, down))


_PLAIN_ARGS = (
    "has_gate",
    "interleaved",
    "transposed",
    "activation",
    "alpha",
    "limit",
    "limit_after",
)


@functools.cache
def _code_text(code: WeightCode) -> str:
    return "" if code.is_plain else json.dumps(code.to_json())


@functools.cache
def _format_of_texts(up: str, down: str) -> ExpertFormat:
    """The format whose codes `ExpertForm.as_args` wrote."""
    codes = [WeightCode.from_json(json.loads(text)) if text else PLAIN for text in (up, down)]
    return ExpertFormat(up=codes[0], down=codes[1])


class ExpertBank(NamedTuple):
    """The weights of S slots, views of a bank of records (`ExpertLayout.bank_views`).

    `up`: [S, 2I or I, H], transposed [S, H, 2I or I]; `down`: [S, H, I], transposed [S, I, H];
    biases [S, 2I or I] and [S, H], or None. Each slot contiguous, any stride between slots.
    Where weights are coded, `up` and `down` are planes of codes, never transposed, with the other
    planes that `ExpertForm.format` names beside them, see `WeightPlanes`.
    """

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    up_scales: Tensor | None = None
    up_zeros: Tensor | None = None
    up_global: Tensor | None = None
    down_scales: Tensor | None = None
    down_zeros: Tensor | None = None
    down_global: Tensor | None = None

    @classmethod
    def from_views(cls, views: Mapping[str, Tensor]) -> ExpertBank:
        """Name the views of `ExpertLayout.bank_views`."""
        (up, *up_planes), up_bias, (down, *down_planes), down_bias = ExpertTensors.of(views)
        return cls(up, up_bias, down, down_bias, *up_planes, *down_planes)

    @property
    def up_planes(self) -> WeightPlanes:
        """The up projection as the code's reference takes it."""
        return WeightPlanes(self.up, self.up_scales, self.up_zeros, self.up_global)

    @property
    def down_planes(self) -> WeightPlanes:
        """The down projection as the code's reference takes it."""
        return WeightPlanes(self.down, self.down_scales, self.down_zeros, self.down_global)

    def sizes(self, form: ExpertForm) -> tuple[int, int]:
        """H and I."""
        inputs, outputs = self.down.shape[1:] if form.transposed else self.down.shape[:0:-1]
        return int(outputs), int(inputs) * (2 if form.format.down.functions.bits == 4 else 1)

    def slot_weights(self, slot: int, form: ExpertForm) -> tuple[Tensor, Tensor]:
        """Up and down projection of one slot in float32, [2I or I, H] and [H, I]."""
        up = dequantise(part_of(self.up_planes, slot), form.format.up)
        down = dequantise(part_of(self.down_planes, slot), form.format.down)
        return (up.t(), down.t()) if form.transposed else (up, down)


def part_of(planes: WeightPlanes, slots: int | slice) -> WeightPlanes:
    """Planes of one slot of a bank, or of some."""
    codes, *rest = planes
    return WeightPlanes(codes[slots], *(None if plane is None else plane[slots] for plane in rest))


def activate(x: Tensor, activation: str) -> Tensor:
    """Element-wise activation in the dtype of `x`."""
    if activation == "silu":
        return functional.silu(x)
    if activation == "gelu":
        return functional.gelu(x)
    if activation == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    if activation == "relu":
        return functional.relu(x)
    if activation == "relu2":
        return functional.relu(x).square()
    raise ValueError(f"no element-wise activation is called {activation!r}")


def apply_gate(hidden: Tensor, form: ExpertForm) -> Tensor:
    """Plain torch form of the gate: [N, 2I] (or [N, I] without a gate) -> [N, I]."""
    if not form.has_gate:
        return activate(hidden, form.activation)
    gate, up = (
        (hidden[..., ::2], hidden[..., 1::2]) if form.interleaved else hidden.chunk(2, dim=-1)
    )
    if form.is_limited:
        up = up.clamp(-form.limit, form.limit)
        if not form.limit_after:
            gate = gate.clamp(max=form.limit)
    if form.activation == "swiglu_oai":
        return (up + 1) * (gate * torch.sigmoid(gate * form.alpha))
    gate = activate(gate, form.activation)
    if form.is_limited and form.limit_after:
        gate = gate.clamp(max=form.limit)
    return gate * up


def recognise_form(module: torch.nn.Module) -> ExpertForm:
    """Return the form of an experts module of transformers.

    The gate is a method of the module, not a description: each form that the kernels have is
    compared with it on numbers that reach both sides of every limit.

    Raises:
        UnsupportedModelError: the module's gate or activation is none that the kernels have.
    """
    owner: Any = module
    layout: dict[str, Any] = {
        "has_gate": bool(owner.has_gate),
        "transposed": bool(owner.is_transposed),
    }
    limits = [getattr(owner, name, None) for name in ("limit", "swiglu_limit")]
    limit = next((float(value) for value in limits if value is not None), math.inf)
    alphas = [getattr(owner, name, None) for name in ("alpha", "swiglu_alpha")]
    alpha = next((float(value) for value in alphas if value is not None), 1.0)

    reach = 2 * limit if math.isfinite(limit) else 8.0
    generator = torch.Generator().manual_seed(0)
    probe = (torch.rand(64, 64, generator=generator) * 2 - 1) * reach
    expected = owner._apply_gate(probe) if owner.has_gate else owner.act_fn(probe)
    for form in _candidate_forms(layout, alpha, limit):
        if torch.allclose(apply_gate(probe, form), expected, rtol=1e-5, atol=1e-5):
            return form
    raise UnsupportedModelError(
        f"The gate of {type(module).__name__} is none that the kernels have"
        f" ({', '.join(ACTIVATIONS)}, each with or without a limit); it runs on the CPU only."
    )


def _candidate_forms(layout: Mapping[str, Any], alpha: float, limit: float) -> list[ExpertForm]:
    plain = [name for name in ACTIVATIONS if name != "swiglu_oai"]
    if not layout["has_gate"]:
        return [ExpertForm(activation=name, **layout) for name in plain]
    return [
        ExpertForm(
            activation=name,
            alpha=alpha if name == "swiglu_oai" else 1.0,
            limit=bound,
            limit_after=after,
            interleaved=interleaved,
            **layout,
        )
        for name in ACTIVATIONS
        for bound in dict.fromkeys((math.inf, limit))
        for after in ((False, True) if math.isfinite(bound) and name != "swiglu_oai" else (False,))
        for interleaved in (False, True)
    ]
