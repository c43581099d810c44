"""`prefetch="auto"`: which engines predict with it, and what a graph without predictions holds."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import specmoe_compile
from benchmarks.cpu_disk.plan import Cell as DiskCell
from benchmarks.full_size.arms import ARMS as FULL_SIZE_ARMS
from benchmarks.speculation import run as speculation_run
from specmoe_compile import backend
from specmoe_compile.bench.arms import ARMS as BENCH_ARMS
from specmoe_compile.calibrate.fidelity import _graph_options
from specmoe_compile.hf.attach import session_of
from specmoe_compile.hf.prompts import prompts_as_they_are
from specmoe_compile.options import CompileOptions, SessionOptions
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.runtime.cpu.live_engine import LiveEngine
from specmoe_compile.runtime.cuda.prefetch_budget import prefetch_pays
from tests.helpers import greedy, prompts, tiny_qwen3_moe
from tests.runtime.cuda.recorded import Prompt, Recorder
from tests.runtime.cuda.stream_model import StreamModel
from tests.runtime.cuda.test_disk_supply import Disk
from tests.runtime.cuda.test_resident import FEW, MANY, MIXED, opened
from tests.runtime.fakes import E
from tests.runtime.test_session import make_session

LEFT_OUT = 'prefetch="auto" predicts no experts'


@pytest.mark.parametrize(
    ("slots", "num_experts", "pays"),
    [
        ([3], [8], True),
        ([4], [8], False),
        ([7], [8], False),
        ([4], [9], True),
        ([4, 4, 4], [8, 4, 8], False),  # one is resident, the others have half
        ([3, 3, 3], [8, 3, 8], True),  # one is resident, the others have less than half
        ([4, 4], [8, 9], True),  # one layer is enough
        ([8, 8], [8, 8], False),
    ],
)
def test_predictions_pay_where_some_layer_has_slots_for_less_than_half(
    slots: list[int], num_experts: list[int], pays: bool
) -> None:
    assert prefetch_pays(slots, num_experts) == pays


def test_what_each_engine_says() -> None:
    for slots in (2, E // 2 - 1, E // 2, E - 1):
        with opened(StreamModel(), slots=slots) as session:
            assert session.engine.prefetch_pays == (slots < E // 2), slots
    with opened(StreamModel(), MIXED, slots=FEW) as session:
        assert session.engine.resident_layers == {1} and 2 * FEW == MANY
        assert not session.engine.prefetch_pays
    with opened(StreamModel(), MIXED, slots=FEW - 1) as session:
        assert session.engine.prefetch_pays
    with Disk(slots=E // 2).session as session:
        assert session.engine.prefetch_pays, "not measured on disk, where trials find out"
    for cache, pays in (
        ("double_buffers", True),
        ("half", False),
        ("all", False),
        ("in_place", False),
    ):
        with make_session(cache) as session:
            assert session.engine.prefetch_pays == pays, cache
    assert not LiveEngine().prefetch_pays


def decided(
    given: dict[str, Any], *engines: bool, fetches: bool = True, device: str = "cuda"
) -> Any:
    """What `prefetch` becomes beside engines that say so."""
    told = [SimpleNamespace(prefetch_pays=pays, fetches=fetches) for pays in engines]
    place = torch.device(device)
    sessions: Any = [SimpleNamespace(engine=engine, device=place) for engine in told]
    return backend._with_prefetch_decided(sessions, CompileOptions.from_kwargs(given)).prefetch


def test_auto_predicts_unless_all_engines_are_against_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert decided({}, True) is True
    assert decided({}, False, True) is True
    assert decided({}, False, fetches=False) is True, "nothing is left out that could be"
    assert LEFT_OUT not in caplog.text
    assert decided({}, False, False) is False
    assert caplog.text.count(LEFT_OUT) == 1 and "prefetch=True predicts anyway" in caplog.text
    assert "half of the experts" in caplog.text and "on a CPU" not in caplog.text
    caplog.clear()
    assert decided({}, False, device="cpu") is False
    assert caplog.text.count(LEFT_OUT) == 1 and "on a CPU with an expert cache" in caplog.text


@pytest.mark.parametrize("pays", [True, False])
def test_who_says_yes_or_no_is_obeyed(pays: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert decided({"prefetch": True}, pays) is True
    assert decided({"prefetch": False}, pays) is False
    assert LEFT_OUT not in caplog.text


@pytest.mark.parametrize(
    "given",
    [
        {"policy": "commit"},
        {"policy": "default_vector"},
        {"control": True},
        {"predictor": "residual"},
        {"lookahead": 2},
        {"prefetch_width": 4},
        {"default_vectors": "vectors.safetensors"},
        {"prefetch_budget_bytes": 0},
    ],
    ids=str,
)
def test_who_asks_for_predictions_gets_them(given: dict[str, Any]) -> None:
    assert decided(given, False) is True
    assert decided({"prefetch": "auto", **given}, False) is True
    assert decided({"auto_off": False, "transfer": "gather"}, False) is False, "no such wish"


def test_sessions_and_passes_never_see_auto() -> None:
    options = CompileOptions.from_kwargs()
    assert options.prefetch == "auto" and options.predicts
    assert SessionOptions.view(options).as_dict()["prefetch"] is True
    assert PassConfig.from_options(options).prefetch is True
    assert not CompileOptions(prefetch=False).predicts
    assert SessionOptions.view(CompileOptions(prefetch=False)).prefetch is False
    keys = {PassConfig.from_options(CompileOptions(prefetch=p)).key() for p in (True, False)}
    assert len(keys) == 2, "compiled code with and without predictions is not mixed up"


@pytest.mark.parametrize(("slots", "predicts"), [(E // 2 - 1, True), (E // 2, False)])
@torch.no_grad()
def test_a_prompt_that_no_graph_runs_tells_a_session_the_same(slots: int, predicts: bool) -> None:
    cache, prompt = SimpleNamespace(is_compileable=True), torch.zeros(1, 40, dtype=torch.int64)
    with opened(StreamModel(), slots=slots) as session:
        assert session.speculation.prefetch == "auto"
        call = prompts_as_they_are(
            lambda *_, **__: "compiled",
            lambda *_, **__: "plain",
            options=CompileOptions(transfer="gather"),
            session=session,
        )
        assert call(input_ids=prompt, past_key_values=cache) == "plain"
        assert session.speculation.prefetch is predicts


def test_policies_are_compared_with_predictions_in_the_graph() -> None:
    assert CompileOptions.from_kwargs(_graph_options(CompileOptions())).prefetch is True


@pytest.mark.usefixtures("prompts_left_to_the_model")
@pytest.mark.parametrize(("given", "predicts"), [({}, False), ({"prefetch": True}, True)])
def test_a_model_on_a_cpu_with_a_cache_is_predicted_where_that_is_asked_for(
    given: dict[str, Any], predicts: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, ids = tiny_qwen3_moe(), prompts(1, 20)
    model = specmoe_compile.offload(
        tiny_qwen3_moe(), store="disk", store_dir=tmp_path, expert_cache="50%", device="cpu"
    )
    options = {"lowering": "eager", "auto_off": False, **given}
    run: Any = torch.compile(model, backend="specmoe", options=options)
    with caplog.at_level(logging.INFO, "specmoe_compile"):
        tokens = greedy(run, ids, 12, cache_implementation="static")
    stats, decided = specmoe_compile.stats(model), session_of(model).speculation.prefetch
    specmoe_compile.close(model)
    torch._dynamo.reset()
    assert torch.equal(tokens, greedy(plain, ids, 12))
    assert decided is predicts and (LEFT_OUT in caplog.text) == (not predicts)
    assert stats.total.misses > 0 and stats.total.hits > 0
    assert (stats.total.predicted > 0) == (stats.total.prefetches > 0) == predicts
    (printed,) = [line.split() for line in f"{stats}".splitlines() if line.startswith("total")]
    assert printed.count("-") == (0 if predicts else 2), "no share and no recall of no guesses"


@pytest.mark.parametrize("cell", [c for c in speculation_run.CELLS if c.arm == "specmoe"], ids=str)
def test_cells_that_are_about_prefetching_ask_for_it(cell: Any) -> None:
    assert dict(cell.options)["prefetch"] is True


def test_arms_that_are_about_prefetching_ask_for_it() -> None:
    assert BENCH_ARMS["prefetch"].options == {"prefetch": True}
    assert BENCH_ARMS["specmoe"].options == {}, "as it comes"
    assert DiskCell(arm="specmoe").all_options == {"prefetch": True}
    always = DiskCell(arm="specmoe", options=(("auto_off", False),)).all_options
    assert always == {"prefetch": True, "auto_off": False}
    assert DiskCell(arm="cache").all_options == {}
    for name, arm in FULL_SIZE_ARMS.items():
        ahead = name.startswith(("specmoe", "prefetch", "commit", "default_vector"))
        assert arm.options["prefetch"] is ahead is arm.speculates, name


@pytest.mark.usefixtures("prompts_left_to_the_model")
@pytest.mark.parametrize(("slots", "predicts"), [(3, True), (4, False)])
def test_a_model_on_a_device_is_predicted_where_it_pays(
    slots: int, predicts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    plain = tiny_qwen3_moe()
    recorder = Recorder(plain, prefetch="auto", transfer="gather")
    prompt, streams = Prompt(new_tokens=3), StreamModel()
    with (
        caplog.at_level(logging.INFO, "specmoe_compile"),
        recorder.session(streams, slots=slots) as session,
    ):
        tokens = recorder.run(prompt, session)
        total = session.stats.total
        assert session.speculation.prefetch is predicts
    torch._dynamo.reset()
    assert torch.equal(tokens, prompt.generate(plain))
    assert (recorder.prefetches > 0) == (recorder.blends > 0) == (recorder.waits > 0) == predicts
    assert recorder.branches == 0
    assert (LEFT_OUT in caplog.text) == (not predicts)
    assert total.misses > 0 and (predicts or total.prefetches == 0)
