"""The size of a trace's experts in another number format.

Shape letters: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from specmoe_compile.hf.quantised.modelopt import NVFP4_CODE
from specmoe_compile.replay.trace import RoutingTrace
from specmoe_compile.runtime.experts.formats.expert_format import (
    DOWN_NAME,
    PLAIN_FORMAT,
    UP_NAMES,
    ExpertFormat,
)
from specmoe_compile.runtime.experts.formats.quantise import QUANTISED_FORMATS
from specmoe_compile.runtime.experts.layout import ExpertLayout

_PLAIN: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "float32": torch.float32}
_CODED: Mapping[str, ExpertFormat] = {
    **QUANTISED_FORMATS,
    "nvfp4": ExpertFormat(up=NVFP4_CODE, down=NVFP4_CODE),
}
FORMATS = (*_PLAIN, *_CODED)
"""What a trace's experts can be taken to be in."""


def described(layouts: Sequence[ExpertLayout]) -> list[dict[str, Any]]:
    """What each layer's experts are made of, as plain data; one entry where all are alike."""
    found = [
        {
            "tensors": {
                name: [list(shape), str(dtype).removeprefix("torch.")]
                for name, (shape, dtype) in _plain_tensors(layout).items()
            }
        }
        for layout in layouts
    ]
    return found[:1] if all(entry == found[0] for entry in found) else found


def in_format(
    trace: RoutingTrace, name: str, layouts: Sequence[ExpertLayout] | None = None
) -> RoutingTrace:
    """The trace with records as large as in another format.

    Args:
        trace: what its experts are made of is in its setting, if it was recorded there.
        name: of `FORMATS`.
        layouts: of its store, used where the trace does not say.

    Raises:
        ValueError: neither says what the experts are made of, or they do not fit the format.
    """
    experts = trace.setting.get("experts")
    if experts is None and layouts is not None:
        experts = described(layouts)
    if experts is None:
        raise ValueError(
            "The trace does not say what its experts are made of, so --format cannot tell their"
            " size: give its store with --store-dir, or record it again."
        )
    per_layer = experts * trace.layers if len(experts) == 1 else experts
    return replace(trace, record_bytes=tuple(_record_bytes(e["tensors"], name) for e in per_layer))


def _record_bytes(tensors: Mapping[str, Any], name: str) -> int:
    shapes = {key: tuple(shape) for key, (shape, _) in tensors.items()}
    if name in _PLAIN:
        dtypes = dict.fromkeys(shapes, _PLAIN[name])
        format = PLAIN_FORMAT
    else:
        dtypes = {key: getattr(torch, dtype) for key, (_, dtype) in tensors.items()}
        format = _CODED[name]
    return ExpertLayout.from_shapes(format.tensors(shapes, dtypes), format).record_bytes


def _plain_tensors(layout: ExpertLayout) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Weights, [N, K] each, and biases, without the planes of codes."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for spec in layout.tensors:
        if spec.name in (*UP_NAMES, DOWN_NAME):
            code = layout.format.code(spec.name)
            rows, columns = spec.shape
            if not code.is_plain and code.functions.bits == 4:
                columns *= 2
            found[spec.name] = ((rows, columns), spec.dtype)
        elif spec.name.endswith("_bias"):
            found[spec.name] = (spec.shape, spec.dtype)
    up = next((found[name][0] for name in UP_NAMES if name in found), None)
    if up is not None and up[1] != found[DOWN_NAME][0][0]:
        # A plain module may have its weights transposed.
        for name in (*UP_NAMES, DOWN_NAME):
            if name in found:
                found[name] = (found[name][0][::-1], found[name][1])
    return found
