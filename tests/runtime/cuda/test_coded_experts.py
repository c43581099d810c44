"""What a session on a device makes of records that hold codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.full_size.model import InlineStreams, coded
from specmoe_compile.errors import UnsupportedModelError
from specmoe_compile.runtime.cuda.parts import DecoderParts
from specmoe_compile.runtime.experts.formats.expert_format import ExpertFormat
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode
from tests.runtime.fakes import experts_layer, randomise
from tests.runtime.test_session_expert_forms import gpt_oss


def parts_of(module: Any, code: WeightCode) -> DecoderParts:
    layer = coded(experts_layer(0, module), ExpertFormat(up=code, down=code))
    streams: Any = InlineStreams()
    return DecoderParts.for_layers([layer], [2], streams, torch.device("cpu"))


def test_codes_are_row_major_whatever_the_module_has() -> None:
    module = randomise(gpt_oss())
    assert module.is_transposed
    parts = parts_of(module, WeightCode(book="e2m1", block=(1, 32), scale="e8m0"))
    (form,) = parts.forms
    assert not form.transposed and form.interleaved and form.format.name == "MXFP4"
    assert parts.hidden_sizes == [module.hidden_size]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (WeightCode(book="int4", block=(1, 12), scale="bf16"), "12 inputs share a scale"),
        (WeightCode(book="int8", block=(1, 0), scale="f32"), "a row has 33 codes of 8 bits"),
    ],
)
def test_codes_that_no_kernel_reads_are_refused_when_a_model_is_loaded(
    code: WeightCode, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "33" in reason:
        monkeypatch.setattr("tests.runtime.test_session_expert_forms.H", 33)
    module = randomise(gpt_oss())
    with pytest.raises(UnsupportedModelError, match=f"{reason}.*device='cpu'"):
        parts_of(module, code)
