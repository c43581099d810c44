"""Running experts on the CPU, one expert's tokens at a time.

Numerics are those of Hugging Face's `grouped_mm_experts_forward`: the same matrix products per
expert, the module's own gate, activation and norm, then `(y * weights).sum` over K. (Large experts
in a step of decode: the same products, summed in another order, see `native`.) Each expert's
rows are computed by themselves and the sum has a fixed order, so that the result does not depend on
which experts were there first.

Shape letters: T tokens, E experts, K top-k, H hidden, I expert intermediate,
N tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from specmoe_compile.errors import SpecMoEError
from specmoe_compile.options import MAX_DECODE_TOKENS
from specmoe_compile.runtime.cpu.kernels import OneToken, one_token_kernel_or_none
from specmoe_compile.runtime.cpu.native.layer import NativeLayer, Task, native_layer_or_none
from specmoe_compile.runtime.cpu.packed import packed_product
from specmoe_compile.runtime.experts.formats.expert_format import ExpertTensors
from specmoe_compile.runtime.experts.formats.weight_code import WeightPlanes
from specmoe_compile.runtime.experts.layout import ExpertLayout
from specmoe_compile.system.free_cores import free_cores


class ExpertRunner:
    """Computes one layer's experts with the layer's own activation, gate and norm."""

    __slots__ = (
        "_format",
        "_gate",
        "_is_transposed",
        "_layout",
        "_norm",
        "_one_token",
        "_up_name",
        "dtype",
        "foreign",
        "hidden_size",
        "native",
        "num_experts",
    )

    def __init__(
        self,
        module: torch.nn.Module,
        layout: ExpertLayout,
        num_experts: int,
        *,
        native: bool = False,
        is_slice: bool = False,
    ) -> None:
        """Read what the module says about itself (`use_experts_implementation`).

        Args:
            module: the experts module.
            layout: of its records.
            num_experts: E.
            native: the weights are records, which the C++ engine may compute from.
            is_slice: the id E stands for experts of other ranks, whose outputs are zero here.
        """
        owner: Any = module
        self._layout = layout
        self._format = layout.format
        self._up_name = "gate_up_proj" if owner.has_gate else "up_proj"
        self._is_transposed = bool(owner.is_transposed) and self._format.is_plain
        self._gate: Callable[[Tensor], Tensor] = (
            owner._apply_gate if owner.has_gate else owner.act_fn
        )
        self._norm: Callable[[Tensor], Tensor] | None = (
            owner.post_expert_norm if getattr(owner, "has_post_expert_norm", False) else None
        )
        # Codes do not say what to compute in; the module's parameters have the model's dtype.
        self.dtype: torch.dtype = getattr(module, self._up_name).dtype
        down = next(s.shape for s in layout.tensors if s.name == "down_proj")
        self.hidden_size = down[1] if self._is_transposed else down[0]
        self.num_experts = num_experts
        self.foreign: int | None = num_experts if is_slice else None
        self._one_token: OneToken | Literal["unknown"] | None = "unknown"
        self.native: NativeLayer | None = (
            native_layer_or_none(module, layout, self.dtype) if native else None
        )

    def check_ids(self, experts: Sequence[int]) -> None:
        """Raise `SpecMoEError` when an expert number is outside 0..E-1."""
        if experts and (min(experts) < 0 or max(experts) >= self.num_experts):
            raise SpecMoEError(
                f"The router asks for experts {min(experts)}..{max(experts)}, but this layer has"
                f" experts 0..{self.num_experts - 1}."
            )

    def own(self, row: Sequence[int]) -> list[int]:
        """The experts of a token without those of other ranks."""
        return [expert for expert in row if expert != self.foreign]

    def new_outputs(self, x: Tensor, ids: Tensor) -> Tensor:
        """Memory for the outputs of a step, [T, K, H]; rows of other ranks' experts are zero."""
        make = x.new_empty if self.foreign is None else x.new_zeros
        return make((*ids.shape, x.shape[-1]))

    def weights(self, record: Tensor) -> ExpertTensors:
        """Return the views of a record, [record_bytes] uint8; cheap to keep, slow to make.

        Plain weights are views that can be the right side of a product, [H, 2I] and [I, H].
        """
        tensors = ExpertTensors.of(self._layout.views(record))
        if self._is_transposed or not self._format.is_plain:
            return tensors
        return tensors._replace(up=_turned(tensors.up), down=_turned(tensors.down))

    def run(self, weights: ExpertTensors, x: Tensor) -> Tensor:
        """Unweighted output of one expert: [N, H] -> [N, H], in the model's dtype."""
        if not self._format.is_plain:
            return self._run_packed(weights, x)
        (up, *_), up_bias, (down, *_), down_bias = weights
        # Where C++ computes steps, a kernel would be compiled for a prompt's lone rows alone.
        is_step = x.shape[0] == 1 and self.native is None
        if is_step and (kernel := self._kernel_or_none(weights)) is not None:
            out = kernel(x[0], up.t(), up_bias, down.t(), down_bias).unsqueeze(0)
            return out if self._norm is None else self._norm(out)
        hidden = torch.mm(x, up)
        if up_bias is not None:
            hidden.add_(up_bias)
        out = torch.mm(self._gate(hidden), down)
        if down_bias is not None:
            out.add_(down_bias)
        return out if self._norm is None else self._norm(out)

    def _run_packed(self, weights: ExpertTensors, x: Tensor) -> Tensor:
        """`run` from codes: float32 products, rounded to the model's dtype after each."""
        hidden = packed_product(x, weights.up, self._format.up)
        if weights.up_bias is not None:
            hidden.add_(weights.up_bias)
        hidden = self._gate(hidden.to(self.dtype))
        out = packed_product(hidden, weights.down, self._format.down)
        if weights.down_bias is not None:
            out.add_(weights.down_bias)
        out = out.to(self.dtype)
        return out if self._norm is None else self._norm(out)

    def _kernel_or_none(self, weights: ExpertTensors) -> OneToken | None:
        if self._one_token == "unknown":
            (up, *_), up_bias, (down, *_), down_bias = weights
            self._one_token = one_token_kernel_or_none(
                self._gate, up.t(), up_bias, down.t(), down_bias
            )
        return self._one_token


def _turned(planes: WeightPlanes) -> WeightPlanes:
    return WeightPlanes(planes.codes.t())


class Routing:
    """Which rows of a batch each expert computes, and where their outputs go.

    One token that uses K different experts is by far the most frequent case, and is kept free of
    tensor arithmetic.

    Attributes:
        experts: distinct experts, in the order of first use (one token) or ascending.
    """

    __slots__ = ("_rows", "_tokens", "_x", "experts")

    def __init__(self, x: Tensor, ids: Tensor, runner: ExpertRunner) -> None:
        """Group tokens by expert.

        Args:
            x: [T, H] float, CPU.
            ids: [T, K] int64, CPU.
            runner: the layer's; says E and the dtype to compute in.

        Raises:
            SpecMoEError: an id is outside 0..E-1.
        """
        self._x = x if x.dtype == runner.dtype else x.to(runner.dtype)
        self._tokens: Tensor | None = None
        if ids.shape[0] == 1:
            chosen: list[int] = ids.tolist()[0]
            experts = runner.own(chosen)
            self._rows: dict[int, Any] = {
                expert: k for k, expert in enumerate(chosen) if expert != runner.foreign
            }
            if len(self._rows) == len(experts):
                runner.check_ids(experts)
                self.experts = experts
                return
        flat = ids.reshape(-1)
        # The very call of Hugging Face: tokens in another order may round differently.
        order = torch.sort(flat).indices
        own = flat if runner.foreign is None else flat[flat != runner.foreign]
        if own.numel():
            runner.check_ids((int(own.min()), int(own.max())))
        counts: list[int] = torch.bincount(flat, minlength=runner.num_experts).tolist()
        self._tokens = order // ids.shape[1]
        self._rows = {}
        start = 0
        # The id of other ranks' experts is the largest, so that its rows come last.
        for expert, count in enumerate(counts[: runner.num_experts]):
            if count:
                self._rows[expert] = (order[start : start + count], start, start + count)
                start += count
        self.experts = list(self._rows)

    def compute(
        self, experts: Sequence[tuple[int, ExpertTensors]], runner: ExpertRunner, y: Tensor
    ) -> None:
        """Compute the rows of some experts and put them into `y`, [T*K, H], contiguous."""
        if runner.native is not None and self._x.shape[0] <= MAX_DECODE_TOKENS:
            tasks = [self._task(*expert, runner.native) for expert in experts]
            runner.native.run(tasks, self._x, y)
            return
        for expert, weights in experts:
            if self._tokens is None:
                y[self._rows[expert]] = runner.run(weights, self._x)[0]
                continue
            rows, start, end = self._rows[expert]
            with free_cores.used():
                out = runner.run(weights, self._x[self._tokens[start:end]])
            y[rows] = out.to(y.dtype)

    def _task(self, expert: int, weights: ExpertTensors, native: NativeLayer) -> Task:
        record = native.record_of(weights.up.codes)
        if self._tokens is None:
            return Task(record, (0,), (self._rows[expert],))
        rows, start, end = self._rows[expert]
        return Task(record, self._tokens[start:end].tolist(), rows.tolist())


def reduce_experts(y: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    """Weighted sum over K: [T, K, H] and [T, K] -> [T, H] in the dtype of `like`."""
    out = (y * weights.unsqueeze(-1)).sum(dim=1)
    return out if out.dtype == like.dtype else out.to(like.dtype)
