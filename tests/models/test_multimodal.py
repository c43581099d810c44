"""A multimodal model: its language model is offloaded, its vision part stays, images work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import specmoe_compile
from specmoe_compile.hf.attach import session_of
from specmoe_compile.passes.report import PipelineReport
from specmoe_compile.runtime.experts.module import is_experts_module
from tests.models.families import build, families
from tests.models.walk import LOGITS_TOLERANCE, recorded_reports

NEW_TOKENS = 8
IMAGE_TOKEN, PADDING = 95, 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of Qwen3-VL-MoE, vision part included."""
    folder = tmp_path_factory.mktemp("qwen3_vl_moe")
    model = build(families()["qwen3_vl_moe"])
    model.config.video_token_id = 94  # type: ignore[attr-defined]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    model: Any = families()["qwen3_vl_moe"].model_class
    return model.from_pretrained(folder).eval()


@pytest.fixture
def offloaded(folder: Path, tmp_path: Path) -> Iterator[Any]:
    model = specmoe_compile.from_pretrained(
        folder,
        device="cpu",
        store="disk",
        expert_cache="50%",
        store_dir=tmp_path / "store",
        progress=False,
    )
    yield model
    specmoe_compile.close(model)


def two_images(model: Any) -> dict[str, torch.Tensor]:
    """Two prompts, each with an image of another size among text, the second padded on the left."""
    generator = torch.Generator().manual_seed(0)
    vision = model.config.vision_config
    grids = torch.tensor([[1, 4, 4], [1, 2, 4]])
    patches = int(grids.prod(dim=1).sum())
    channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    ids = torch.randint(2, 90, (2, 14), generator=generator)
    for row, grid in enumerate(grids):
        tokens = int(grid.prod()) // vision.spatial_merge_size**2
        ids[row, 5 : 5 + tokens] = IMAGE_TOKEN
    ids[1, :3] = PADDING
    return {
        "input_ids": ids,
        "attention_mask": (ids != PADDING).long(),
        "pixel_values": torch.randn(patches, channels, generator=generator),
        "image_grid_thw": grids,
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
    }


@torch.no_grad()
def generate(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    return model.generate(
        **inputs,
        **kwargs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def test_only_the_language_models_experts_are_offloaded(plain: Any, offloaded: Any) -> None:
    assert all(
        layer.name.startswith("model.language_model.") for layer in session_of(offloaded).layers
    )
    wanted = dict(plain.named_parameters())
    emptied = 0
    for name, parameter in offloaded.named_parameters():
        if is_experts_module(plain.get_submodule(name.rpartition(".")[0])):
            emptied += parameter.numel() == 0
        else:
            assert torch.equal(parameter, wanted[name]), name
    assert emptied == 2 * len(session_of(offloaded).layers) > 0
    assert any(name.startswith("model.visual.") for name in wanted)


def test_text_about_images_is_the_unmodified_models(plain: Any, offloaded: Any) -> None:
    inputs = two_images(plain)
    want = generate(plain, inputs)
    blank = generate(plain, {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])})
    assert not torch.equal(want.sequences, blank.sequences), "the image must count"
    reports: list[PipelineReport] = []
    # Images break the graph (their sizes are data), and the vision part's graph calls no experts.
    options = {"lowering": "eager", "strict": False, "prefetch": True}
    compiled = torch.compile(offloaded, backend="specmoe", options=options)
    with recorded_reports(reports):
        got = generate(compiled, inputs, cache_implementation="static")
    torch._dynamo.reset()
    assert torch.equal(got.sequences, want.sequences)
    difference = torch.stack(got.logits) - torch.stack(want.logits)
    assert float(difference.abs().max()) <= LOGITS_TOLERANCE
    layers = len(session_of(offloaded).layers)
    predicted = [r.matches["insert_expert_prefetch"] for r in reports if r.reason is None]
    assert predicted and set(predicted) == {layers - 1}
