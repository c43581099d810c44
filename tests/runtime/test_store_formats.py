"""A store says how its records are coded, and refuses what does not hold together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from specmoe_compile.errors import StoreError
from specmoe_compile.runtime.experts.formats.expert_format import ExpertFormat
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode
from specmoe_compile.runtime.experts.layout import ExpertLayout, StoreLayer
from specmoe_compile.runtime.store.header import (
    StoreHeader,
    header_text,
    layers_to_json,
    read_header,
)


def packed_layers(up: WeightCode) -> list[StoreLayer]:
    format = ExpertFormat(up=up, down=WeightCode(book="e4m3", block=(1, 0), scale="f32"))
    shapes = {"up_proj": (64, 32), "up_proj_bias": (64,), "down_proj": (32, 64)}
    tensors = format.tensors(shapes, dict.fromkeys(shapes, torch.bfloat16))
    layout = ExpertLayout.from_shapes(tensors, format)
    return [StoreLayer(name="mlp.experts", num_experts=2, layout=layout)]


MXFP4 = WeightCode(book="e2m1", block=(1, 32), scale="e8m0")


def packed_header(**changes: Any) -> StoreHeader:
    fields = {
        "layers": tuple(packed_layers(MXFP4)),
        "top_k": 1,
        "fingerprint": "f",
        "source_name": "m",
        "source_files": {},
        "checksums": ((1, 2),),
    }
    return StoreHeader(**{**fields, **changes})


def test_a_header_keeps_the_format(tmp_path: Path) -> None:
    header = packed_header()
    (tmp_path / "header.json").write_text(header_text(header))
    back = read_header(tmp_path)
    assert back == header
    assert back.layers[0].layout.format.up == MXFP4
    assert [t.name for t in back.layers[0].layout.tensors] == [
        "up_proj",
        "up_proj_scales",
        "up_proj_bias",
        "down_proj",
        "down_proj_scales",
    ]


def test_codes_of_equal_bytes_and_another_meaning_are_told_apart() -> None:
    fp4, int4 = (
        packed_layers(WeightCode(book=book, block=(1, 32), scale="e8m0"))
        for book in ("e2m1", "int4")
    )
    assert fp4[0].layout.tensors == int4[0].layout.tensors
    assert layers_to_json(fp4) != layers_to_json(int4)


def test_a_header_whose_planes_are_not_its_formats_is_refused(tmp_path: Path) -> None:
    layer = packed_layers(MXFP4)[0]
    other = ExpertFormat(
        up=dataclasses.replace(MXFP4, block=(1, 16)), down=layer.layout.format.down
    )
    forged = dataclasses.replace(layer, layout=dataclasses.replace(layer.layout, format=other))
    (tmp_path / "header.json").write_text(header_text(packed_header(layers=(forged,))))
    with pytest.raises(StoreError, match="planes of up_proj"):
        read_header(tmp_path)
