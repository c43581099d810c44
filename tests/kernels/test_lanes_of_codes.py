"""Where products and sums of coded weights may be one operation: lanes that share no unit.

Lanes that share one hold the same sum, each rounded in its own way, and which is stored is chance.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks.kernels.compile_spec import PACKED_SHAPES, ModelShape
from specmoe_compile.kernels.packed_experts.config import gate_up_config, up_fuses
from tests.kernels.packed_cases import FORMATS

SCRIPT = """
import dataclasses, json, re
from benchmarks.kernels.compile_spec import PACKED_SHAPES
from benchmarks.kernels.resources import compiled
from benchmarks.kernels.variants.packed_experts import gate_up_spec

found = []
for shape in {shape.format.up.book: shape for shape in PACKED_SHAPES}.values():
    for hidden in (shape.hidden, 256, 128, 64):
        spec = gate_up_spec(dataclasses.replace(shape, hidden=hidden), 1)
        text = compiled(spec, 90).asm["ttgir"]
        layouts = dict(re.findall(r"^(#\\w+) = (.*)$", text, re.M))
        # The sum of a unit is the one along the last of three axes.
        reduced = r'"tt.reduce".{,60}?axis = 2 .*?: \\(tensor<[^,>]*, (#\\w+)>'
        layout = layouts[re.search(reduced, text, re.S)[1]]
        held = dict(re.findall(r"(\\w+) = (\\[[^=]*\\])[,}]", layout))
        if "lane" in held:  # a linear layout: each bit of a lane's and a warp's number
            bits = json.loads(held["lane"]) + json.loads(held["warp"])
            lanes = 2 ** sum(bit[2] > 0 for bit in bits)
        else:
            lanes = json.loads(held["threadsPerWarp"])[2] * json.loads(held["warpsPerCTA"])[2]
        found.append([spec.fp_fusion, lanes])
print(json.dumps(found))
"""


@pytest.mark.parametrize("shape", PACKED_SHAPES, ids=lambda shape: shape.name)
def test_models_have_tiles_for_all_lanes(shape: ModelShape) -> None:
    code = shape.format.up
    config = gate_up_config(shape.hidden, code, has_gate=shape.has_gate)
    assert up_fuses(config, code, has_gate=shape.has_gate) == (code.book != "nf4")


@pytest.mark.parametrize("name", FORMATS)
def test_a_tile_with_less_than_a_load_of_each_lane_is_not_fused(name: str) -> None:
    code = FORMATS[name].up
    bits = code.functions.bits
    # Eight gates and ups of 128 bytes each are 16 bytes of 128 lanes.
    for hidden, fuses in ((128 * 8 // bits, True), (64 * 8 // bits, False)):
        config = gate_up_config(hidden, code, has_gate=True)
        assert up_fuses(config, code, has_gate=True) == (fuses and code.book != "nf4")
        assert not up_fuses(config, code, has_gate=False)


def test_lanes_share_no_unit_where_products_are_fused() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert {fused for fused, _ in found} == {True, False}
    assert all(lanes == 1 for fused, lanes in found if fused)
    assert any(lanes > 1 for fused, lanes in found if not fused), "the rule is about nothing"
