"""The passes and a real session: what statistics must read when the lookahead cannot be wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import specmoe_compile
from specmoe_compile.hf.attach import session_of
from specmoe_compile.options import SessionOptions
from tests.helpers import greedy, prompts, tiny_qwen3_moe


def _generated(folder: Path, **options: Any) -> tuple[torch.Tensor, Any]:
    model = specmoe_compile.offload(
        tiny_qwen3_moe(), store="disk", store_dir=folder / "store", expert_cache="50%"
    )
    options = {"lowering": "eager", "prefetch": True, "auto_off": False, **options}
    run = torch.compile(model, backend="specmoe", options=options)
    tokens = greedy(run, prompts(1, 20), 12, cache_implementation="static")  # type: ignore[arg-type]
    return tokens, specmoe_compile.stats(model)


@pytest.mark.usefixtures("prompts_left_to_the_model")
@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_control_reads_full_recall(tmp_path: Path, lowering: str) -> None:
    tokens, stats = _generated(tmp_path, control=True, lowering=lowering)
    assert torch.equal(tokens, greedy(tiny_qwen3_moe(), prompts(1, 20), 12))
    first, *others = stats.layers
    assert first.needed == 0
    for layer in others:
        assert layer.needed == 11 * 2 and layer.recall == 1.0


@pytest.mark.usefixtures("prompts_left_to_the_model")
@pytest.mark.parametrize(
    "options",
    [
        # Fast with calibrated vectors, in tests/predict/test_trained.py.
        pytest.param({}, marks=pytest.mark.slow),
        {"lookahead": 2},
        {"prefetch_width": 4, "skip_layers": [1]},
    ],
)
def test_tokens_are_exact_and_predictions_are_counted(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    tokens, stats = _generated(tmp_path, **options)
    assert torch.equal(tokens, greedy(tiny_qwen3_moe(), prompts(1, 20), 12))
    skipped = options.get("skip_layers", [])
    width = options.get("prefetch_width", 2)
    for index, layer in enumerate(stats.layers):
        steps = 0 if index == 0 or index in skipped else 11
        assert layer.needed == steps * 2 and layer.predicted == steps * width
    assert 0 < stats.total.recall < 1


@pytest.mark.parametrize(("cache", "graphs"), [("static", 2), ("dynamic", 3)])
def test_steady_decode_breaks_and_compiles_nothing(tmp_path: Path, cache: str, graphs: int) -> None:
    model = specmoe_compile.offload(
        tiny_qwen3_moe(layers=2), store="disk", store_dir=tmp_path / "store", expert_cache="50%"
    )
    # With auto_off each layer stands in branches; what breaks or compiles anew, Dynamo decides.
    options = {"lowering": "eager", "prefetch": True}
    run: Any = torch.compile(model, backend="specmoe", options=options)
    kwargs = {"cache_implementation": "static"} if cache == "static" else {}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    greedy(run, prompts(1, 20), 24, **kwargs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        # What is predicted changes from step to step, and must not show in the graphs. Judged by
        # time a layer may be off, and then nothing is counted: here the test says what is off.
        for skipped, predicted_layers in (((), 1), ((1,), 0), ((0,), 1)):
            speculation = replace(SessionOptions(), skip_layers=skipped, auto_off=False)
            session_of(model).configure(speculation)
            before = specmoe_compile.stats(model).total.needed
            greedy(run, prompts(1, 20, seed=1), 24, **kwargs)
            needed = specmoe_compile.stats(model).total.needed - before
            assert needed == 23 * 2 * predicted_layers
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    specmoe_compile.close(model)


def test_a_graph_with_a_plain_model_too_predicts_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    offloaded = specmoe_compile.offload(
        tiny_qwen3_moe(layers=2), store="disk", store_dir=tmp_path / "store", expert_cache="50%"
    )
    plain, ids = tiny_qwen3_moe(layers=2), prompts(1, 4)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        return offloaded(ids, use_cache=False).logits, plain(ids, use_cache=False).logits

    with torch.no_grad():
        options = {"lowering": "eager", "prefetch": True}
        ours, theirs = torch.compile(both, backend="specmoe", options=options)()
    assert torch.equal(ours, theirs)
    assert "only 1 of 2 fetch experts" in caplog.text
    assert specmoe_compile.stats(offloaded).total.predicted == 0
