"""Experts of a quantised checkpoint: the codes of gate and up joined as the model has them.

What transformers' conversion does to plain weights (stack, concatenate, interleave, transpose) is
found out by running it on row numbers, and then done to the rows of the planes. Codes themselves
never pass through it.

Shape letters: E experts, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specmoe_compile.errors import CheckpointError, UnsupportedModelError
from specmoe_compile.hf.quantised.base import QuantisedWeight
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode, WeightPlanes

_SOURCE = 1 << 24  # row numbers of a source stay below it

Convert = Callable[[dict[str, list[Tensor]]], Tensor]
"""Run a model's conversion on one expert's tensors by source pattern; [1, ...]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedTensor:
    """One tensor of an experts module, [E, ...], whose values are codes.

    Attributes:
        sources: by source pattern, the weights of experts 0..E-1; or one weight of all experts.
        rows: for each row of the record its source and its row there, [N] as source * 2^24 + row;
            None if the only source is the tensor itself.
        shape: [N, K] in the record.
        code: in the record; that of the sources, or one with a scale per row where their blocks
            cannot be joined.
    """

    sources: tuple[tuple[QuantisedWeight, ...], ...]
    rows: Tensor | None
    shape: tuple[int, int]
    code: WeightCode

    def planes(self, expert: int) -> WeightPlanes:
        """Read one expert.

        Raises:
            CheckpointError: its tensors are not like those of the first expert.
        """
        read: list[WeightPlanes] = []
        for weights in self.sources:
            first, weight = weights[0], weights[expert if len(weights) > 1 else 0]
            if (weight.code, weight.shape) != (first.code, first.shape):
                raise CheckpointError(
                    f"{weight.stem} is {weight.code}, {list(weight.shape)}, but {first.stem} of the"
                    f" same layer is {first.code}, {list(first.shape)}."
                )
            planes = weight.planes(expert if weight.num_experts is not None else None)
            read.append(_with_block(planes, first.code, first.shape, self.code))
        if self.rows is None:
            return read[0]
        return _join(read, self.code, [source[0].shape[0] for source in self.sources], self.rows)


def join_sources(
    name: str,
    sources: Mapping[str, Sequence[QuantisedWeight]],
    convert: Convert | None,
    *,
    num_experts: int,
    transposed: bool,
    shape: tuple[int, int],
) -> CodedTensor:
    """Describe a tensor of an experts module that is made of quantised weights.

    Args:
        name: the model's tensor, for messages.
        sources: its sources by the converter's pattern.
        convert: the converter, None where the checkpoint has the tensor as it is.
        num_experts: E.
        transposed: whether the module keeps [K, N].
        shape: [N, K], as the configuration expects.

    Raises:
        CheckpointError: experts are missing, or shapes or codes do not fit.
        UnsupportedModelError: the conversion does more than to put rows in an order.
    """
    weights = tuple(tuple(source) for source in sources.values())
    for source in weights:
        stacked = source[0].num_experts
        if (stacked if stacked is not None else len(source)) != num_experts:
            raise CheckpointError(
                f"The checkpoint has {stacked or len(source)} experts for {name}, the configuration"
                f" says {num_experts}: a shard is missing or belongs to another model."
            )
    codes = {source[0].code for source in weights}
    if len(codes) != 1:
        raise UnsupportedModelError(
            f"{name} is made of weights that are coded in different ways, which specmoe does not"
            f" join: {', '.join(map(str, codes))}."
        )
    code = codes.pop()
    shapes = {pattern: source[0].shape for pattern, source in sources.items()}
    rows = None if convert is None else _row_order(name, shapes, convert, transposed)
    first = weights[0][0].shape
    found = first if rows is None else (len(rows), first[1])
    if found != shape:
        raise CheckpointError(
            f"The checkpoint's experts do not fit the model: {name} of one expert is"
            f" {list(found)}, the configuration expects {list(shape)}."
        )
    if rows is not None and len(weights) == 1 and torch.equal(rows, torch.arange(len(rows))):
        rows = None
    if rows is not None:
        code = _joined_code(code, [source[0].shape[0] for source in weights], rows)
    return CodedTensor(sources=weights, rows=rows, shape=shape, code=code)


def _row_order(
    name: str, shapes: Mapping[str, tuple[int, int]], convert: Convert, transposed: bool
) -> Tensor:
    """Where each row of the made tensor comes from, [N]."""

    def run(probes: dict[str, list[Tensor]]) -> Tensor:
        made = convert(probes)[0]
        return made.t() if transposed else made

    rows = run(
        {
            pattern: [(index * _SOURCE + torch.arange(n)).unsqueeze(1).expand(n, k).contiguous()]
            for index, (pattern, (n, k)) in enumerate(shapes.items())
        }
    )
    columns = run(
        {pattern: [torch.arange(k).expand(n, k).contiguous()] for pattern, (n, k) in shapes.items()}
    )
    keeps_rows = rows.dim() == 2 and bool((rows == rows[:, :1]).all())
    if not keeps_rows or not bool((columns == torch.arange(columns.shape[-1])).all()):
        raise UnsupportedModelError(
            f"transformers' conversion of {name} does more than to put rows in an order, so its"
            " quantised weights cannot be kept as they are."
        )
    return rows[:, 0].contiguous()


def _joined_code(code: WeightCode, counts: Sequence[int], rows: Tensor) -> WeightCode:
    """The code after joining: blocks of several rows stay only if they stay whole."""
    height = code.block[0]
    if height == 1:
        return code
    in_order = torch.cat([i * _SOURCE + torch.arange(n) for i, n in enumerate(counts)])
    whole = height > 0 and all(count % height == 0 for count in counts)
    if whole and torch.equal(rows, in_order):
        return code
    return replace(code, block=(1, code.block[1]))


def _with_block(
    planes: WeightPlanes, code: WeightCode, shape: tuple[int, int], wanted: WeightCode
) -> WeightPlanes:
    """Repeat scales for each row where the record has one per row."""
    if code.block == wanted.block or planes.scales is None:
        return planes
    height = code.block[0] or shape[0]
    return planes._replace(
        scales=planes.scales.repeat_interleave(height, dim=0)[: shape[0]],
        zeros=None
        if planes.zeros is None
        else planes.zeros.repeat_interleave(height, dim=0)[: shape[0]],
    )


def _join(
    read: Sequence[WeightPlanes], code: WeightCode, counts: Sequence[int], rows: Tensor
) -> WeightPlanes:
    """Put the rows of several weights in the order of the record."""
    starts = torch.tensor([sum(counts[:index]) for index in range(len(counts))])
    order = starts[rows // _SOURCE] + rows % _SOURCE
    height = code.block[0]
    block_order = order if height == 1 else None

    def join(planes: Sequence[Tensor | None], order: Tensor | None) -> Tensor | None:
        present = [plane for plane in planes if plane is not None]
        if not present:
            return None
        whole = torch.cat(present)
        return whole if order is None else whole[order]

    codes = join([planes.codes for planes in read], order)
    assert codes is not None
    return WeightPlanes(
        codes,
        join([planes.scales for planes in read], block_order),
        join([planes.zeros for planes in read], block_order),
        join([planes.global_ for planes in read], order),
    )
