"""A store of a real model is hardly larger than the experts of the checkpoint."""

from __future__ import annotations

import pytest
import torch

from specmoe_compile.hf.quantised.modelopt import NVFP4_CODE
from specmoe_compile.runtime.experts.formats.expert_format import PLAIN_FORMAT, ExpertFormat
from specmoe_compile.runtime.experts.formats.quantise import QUANTISED_FORMATS
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode
from specmoe_compile.runtime.experts.layout import ExpertLayout

MODELS = {
    "Qwen3-30B-A3B": (2048, 768, False),
    "Qwen3-235B-A22B": (4096, 1536, False),
    "GPT-OSS-20B": (2880, 2880, True),
    "DeepSeek-V3": (7168, 2048, False),
    "Qwen1.5-MoE-A2.7B": (2048, 1408, False),
}
_BLOCKS = WeightCode(book="e4m3", block=(128, 128), scale="f32")
FORMATS = {
    **QUANTISED_FORMATS,
    "nvfp4": ExpertFormat(up=NVFP4_CODE, down=NVFP4_CODE),
    "fp8 blocks": ExpertFormat(up=_BLOCKS, down=_BLOCKS),
    "bf16": PLAIN_FORMAT,
}


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("hidden", "inner", "biases"), MODELS.values(), ids=MODELS)
def test_padding_is_at_most_a_twentieth(
    hidden: int, inner: int, biases: bool, format: ExpertFormat
) -> None:
    shapes: dict[str, tuple[int, ...]] = {"gate_up_proj": (2 * inner, hidden)}
    if biases:
        shapes |= {"gate_up_proj_bias": (2 * inner,)}
    shapes |= {"down_proj": (hidden, inner)}
    if biases:
        shapes |= {"down_proj_bias": (hidden,)}
    tensors = format.tensors(shapes, dict.fromkeys(shapes, torch.bfloat16))
    layout = ExpertLayout.from_shapes(tensors, format)
    assert layout.payload_bytes <= layout.record_bytes <= 1.05 * layout.payload_bytes
