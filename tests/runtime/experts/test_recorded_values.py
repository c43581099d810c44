"""Planes of each format mean what the format's own library makes of the same tensors.

`tests/runtime/recorded/record.py` wrote the tensors and the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import safe_open, save_file

from specmoe_compile.hf.checkpoint import Checkpoint
from specmoe_compile.hf.quantised.schemes import _FORMATS, plain_keys
from specmoe_compile.runtime.experts.formats.weight_code import dequantise
from tests.runtime.quantised_checkpoints import VARIETIES

RECORDED = Path(__file__).parents[1] / "recorded" / "values.safetensors"
BLOCK_FP8: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "strategy": "block",
                "block_structure": [16, 32],
            },
        }
    },
}
SETTINGS: Mapping[str, dict[str, Any]] = {
    **{name: variety.settings for name, variety in VARIETIES.items()},
    "ct_fp8_block": BLOCK_FP8,
    "ao_mxfp4": VARIETIES["ct_mxfp4"].settings,
    "ao_nvfp4": VARIETIES["modelopt_nvfp4"].settings,
    "gptqmodel": VARIETIES["gptq_zeros"].settings,
    "gptqmodel_v2": {**VARIETIES["gptq_zeros"].settings, "checkpoint_format": "gptq_v2"},
    "gptqmodel_awq": VARIETIES["awq"].settings,
}
# What the library rounds scales or products to. Where it divides by a global scale, ours is
# multiplied by the reciprocal; torchao multiplies both scales first, in float32.
ROUNDED = {
    "ao_nvfp4": torch.float32,
    "ct_int4": torch.bfloat16,
    "ct_int4_zeros": torch.bfloat16,
    "ct_mxfp4": torch.bfloat16,
    "ct_nvfp4": torch.bfloat16,
    "gptqmodel": torch.float16,
    "gptqmodel_v2": torch.float16,
    "gptqmodel_awq": torch.float16,
}


def recorded_cases() -> dict[str, dict[str, torch.Tensor]]:
    cases: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(RECORDED, "pt") as file:
        for key in file.keys():  # noqa: SIM118  (not a mapping)
            case, _, name = key.partition("/")
            cases.setdefault(case, {})[name] = file.get_tensor(key)
    return cases


CASES = recorded_cases()


@pytest.mark.parametrize("case", CASES)
def test_values_are_the_librarys(case: str, tmp_path: Path) -> None:
    tensors = dict(CASES[case])
    value = tensors.pop("value")
    path = tmp_path / "weights.safetensors"
    save_file({f"layer.{name}": tensor for name, tensor in tensors.items()}, path)
    with Checkpoint([path]) as checkpoint:
        format = _FORMATS[SETTINGS[case]["quant_method"]](SETTINGS[case])
        format.settings = SETTINGS[case]
        found = plain_keys(format, checkpoint.tensors)
        assert found.keys == ("layer.weight",)
        weight = found.weights["layer.weight"]
        got = dequantise(weight.planes(), weight.code)
    assert got.shape == value.shape
    rounded = ROUNDED.get(case)
    if rounded is None:
        assert torch.equal(got, value)
    else:
        # One step of the library's dtype; in float32 both orders round, each at another place.
        steps = 2 if rounded is torch.float32 else 1
        rtol = steps * torch.finfo(rounded).eps
        torch.testing.assert_close(got, value, rtol=rtol, atol=0)
