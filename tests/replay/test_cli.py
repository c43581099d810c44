"""`specmoe generate --trace` and `specmoe replay` on a tiny checkpoint; traces that are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.reference_model.tokenizer import build_tokenizer
from specmoe_compile.cli.main import run
from specmoe_compile.errors import TraceError
from specmoe_compile.replay.recorder import TraceRecorder
from specmoe_compile.replay.trace import RoutingTrace
from tests.cli.test_main import complaint
from tests.helpers import save_tiny

PROMPT = "THE QUICK BROWN FOX JUMPS OVER 13"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its store, and a trace of a run with predictions."""
    place = tmp_path_factory.mktemp("replay")
    save_tiny(place / "model", layers=4, experts=16, top_k=3)
    build_tokenizer(256).save_pretrained(place / "model")
    arguments = ["generate", str(place / "model"), "--store", "disk"]
    arguments += ["--store-dir", str(place / "store"), "--expert-cache", "25%"]
    arguments += ["--prompt", PROMPT, "--max-new-tokens", "20", "--trace", str(place / "trace")]
    arguments += ["-O", "prefetch=true", "-O", "auto_off=false", "-O", "lowering=eager"]
    arguments += ["--json", str(place / "run.json")]
    assert run(arguments) == 0
    return place


def replayed(folder: Path, out: Path, *arguments: str) -> dict[str, Any]:
    assert run(["replay", str(folder / "trace"), "--json", str(out), *arguments]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_generate_writes_a_trace_of_the_run(folder: Path) -> None:
    trace = RoutingTrace.load(folder / "trace")
    header = json.loads((folder / "store" / "header.json").read_text())
    assert trace.fingerprint == header["fingerprint"]
    assert (trace.layers, trace.num_experts[0], trace.top_k) == (4, 16, 3)
    assert trace.tokens == [len(PROMPT), *[1] * 19]
    assert trace.setting["slots"] == [4] * 4 and trace.setting["cache_policy"] == "adaptive"
    predicted = trace.tensors["predicted"]
    assert not predicted[0].any() and not predicted[:, 0].any() and predicted[1:, 1:].all()
    assert (trace.tensors["read_bytes"] >= 0).all() and trace.tensors["read_bytes"].sum() > 0
    assert (folder / "trace").stat().st_size < 20_000


def test_replay_prints_and_writes_what_a_run_would_do(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--expert-cache", "10%,25%,50%", "--policy", "lru,lfu"]
    found = replayed(folder, tmp_path / "r.json", *sizes, "--predictor", "none,recorded,perfect")
    captured = capsys.readouterr()
    assert "not measured" in captured.out and "not measured" in found["label"]
    assert "saves at most 5 % more" in captured.out
    # 10 % are less than one token's experts: a session refuses that, and a sweep goes on.
    assert "Not replayed: 10%" in captured.err
    assert len(found["refused"]) == 6 and len(found["replays"]) == 12
    for row in found["replays"]:
        assert row["tpot_ms"] > 0 and row["slots"] == {"25%": 4, "50%": 8}[row["expert_cache"]]
        if row["predictor"] == "none":
            assert row["hit_rate"] <= row["belady_hit_rate"]
    assert {row["predictor"] for row in found["sufficient"]} == {"none", "recorded", "perfect"}
    assert found["machine"]["from_trace"] == ["link_gbps", "compute_ms"]


def test_link_and_compute_are_what_the_command_line_says(folder: Path, tmp_path: Path) -> None:
    machine = ["--link-gbps", "0.001", "--compute-ms", "8", "--expert-share", "0"]
    found = replayed(
        folder, tmp_path / "r.json", *machine, "--expert-cache", "0", "--predictor", "none"
    )
    (row,) = found["replays"]
    read_ms = row["demand_bytes_per_token"] / 1e3
    assert row["tpot_ms"] == pytest.approx(8 + read_ms)
    assert (
        row["demand_bytes_per_token"] == 4 * 3 * RoutingTrace.load(folder / "trace").record_bytes[0]
    )


def test_store_dir_accepts_the_model_of_the_trace(folder: Path, tmp_path: Path) -> None:
    replayed(folder, tmp_path / "r.json", "--store-dir", str(folder / "store"))


def test_a_trace_of_another_model_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(RoutingTrace.load(folder / "trace"), fingerprint="0" * 64)
    other.save(tmp_path / "other")
    said = complaint(
        capsys, "replay", str(tmp_path / "other"), "--store-dir", str(folder / "store")
    )
    assert "fingerprint 000000000000" in said and "record it again" in said


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--expert-cache", "lots"], "is not a size"),
        (["--expert-cache", "10%"], "holds 1 experts per layer, but a token uses 3"),
        (["--policy", "fifo"], "--policy 'fifo' is not valid: choose lru, lfu, adaptive."),
        (["--predictor", "oracle"], "choose none, recorded, perfect, previous."),
        (["--link-gbps", "0"], "gbps=0.0 must be above 0"),
        (["--warmup", "99"], "99 of them are warm-up"),
        (["-O", "nonsense=1"], "unknown specmoe option 'nonsense'"),
        (["--store-dir", "/nowhere"], "is not a complete expert store"),
        (["--json", "/nowhere/r.json"], "does not exist"),
    ],
)
def test_bad_arguments_are_one_sentence(
    arguments: list[str], what: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert what in complaint(capsys, "replay", str(folder / "trace"), *arguments)


def damage(folder: Path, place: Path, kind: str) -> Path:
    path = place / kind
    data = bytearray((folder / "trace").read_bytes())
    if kind == "truncated":
        path.write_bytes(data[:-100])
    elif kind == "flipped":
        data[-3] ^= 0x40
        path.write_bytes(data)
    elif kind == "text":
        path.write_text("not a trace")
    elif kind == "other tensors":
        save_file({"a": torch.zeros(1)}, path)
    elif kind == "version":
        path.write_bytes(data.replace(b'"version":"1"', b'"version":"9"'))
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("absent", "there is no routing trace"),
        ("folder", "there is no routing trace"),
        ("truncated", "is not a routing trace"),
        ("text", "is not a routing trace"),
        ("flipped", "is damaged"),
        ("other tensors", "but not a routing trace"),
        ("version", "version 9, this specmoe reads version 1"),
    ],
)
def test_files_that_are_no_trace_are_refused(
    kind: str, what: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert what in complaint(capsys, "replay", str(damage(folder, tmp_path, kind)))


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("ids", lambda ids: ids + 16, "has expert"),
        ("ids", lambda ids: ids[:, :, :0], "ids has shape"),
        ("ids", lambda ids: ids - 17, "below -1"),
        ("weights", lambda weights: weights.double(), "weights is torch.float64"),
        ("tokens", lambda tokens: tokens[1:], "has shape"),
        ("tokens", lambda tokens: tokens * 0, "without tokens"),
        ("step_ms", lambda times: times[1:], "step_ms has shape"),
    ],
)
def test_traces_that_do_not_hold_together_are_refused(
    name: str, change: Any, what: str, folder: Path
) -> None:
    trace = RoutingTrace.load(folder / "trace")
    with pytest.raises(TraceError, match=what):
        replace(trace, tensors={**trace.tensors, name: change(trace.tensors[name])})


def test_recorded_predictions_need_a_run_that_predicted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = RoutingTrace.load(folder / "trace")
    none = {**trace.tensors, "predicted": torch.zeros_like(trace.tensors["predicted"])}
    replace(trace, tensors=none).save(tmp_path / "none")
    said = complaint(capsys, "replay", str(tmp_path / "none"), "--predictor", "recorded")
    assert "holds no predictions" in said


def test_generate_refuses_a_trace_where_nothing_is_fetched(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["generate", str(folder / "model"), "--prompt", PROMPT, "--trace"]
    assert "does not exist" in complaint(capsys, *base, str(tmp_path / "no" / "trace"))
    status = run([*base, str(tmp_path / "trace"), "--store", "ram", "--no-compile"])
    assert status == 2
    assert 'store="disk"' in capsys.readouterr().err
    assert not (tmp_path / "trace").exists()


def test_recorder_of_a_session_that_ran_nothing_says_so(folder: Path) -> None:
    import specmoe_compile
    from specmoe_compile.hf.attach import session_of

    model: Any = specmoe_compile.from_pretrained(
        folder / "model", device="cpu", store="disk", store_dir=folder / "store", progress=False
    )
    recorder = TraceRecorder(session_of(model))
    with pytest.raises(TraceError, match="nothing ran"):
        recorder.trace("tiny")
    specmoe_compile.close(model)


def test_records_are_as_large_as_in_another_format(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--expert-cache", "50%", "--policy", "lru", "--predictor", "none"]
    link = ["--link-gbps", "0.01", "--compute-ms", "1"]
    plain = replayed(folder, tmp_path / "p.json", *asked, *link)
    assert plain["format"] is None
    found = replayed(folder, tmp_path / "r.json", *asked, *link, "--format", "int4")
    assert "Experts as in int4" in capsys.readouterr().out
    sizes = [row["record_bytes"][0] for row in (plain, found)]
    trace = RoutingTrace.load(folder / "trace")
    assert sizes[0] == trace.record_bytes[0] > sizes[1]
    (one,), (other,) = plain["replays"], found["replays"]
    # The same routing and the same slots: fewer bytes, and so less time.
    assert one["total_misses"] == other["total_misses"] and one["tpot_ms"] > other["tpot_ms"]
    tensors = trace.setting["experts"][0]["tensors"]
    weights = sum(rows * columns for (rows, columns), _ in tensors.values())
    assert weights * 0.5 < sizes[1] < weights * 0.5 * 1.25 + 4096


def test_a_trace_that_does_not_know_its_experts_takes_the_stores(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = RoutingTrace.load(folder / "trace")
    old = {name: value for name, value in trace.setting.items() if name != "experts"}
    replace(trace, setting=old).save(tmp_path / "old")
    command = ["replay", str(tmp_path / "old"), "--format", "nvfp4", "--expert-cache", "50%"]
    command += ["--link-gbps", "1", "--compute-ms", "1"]
    assert "does not say what its experts are made of" in complaint(capsys, *command)
    out = tmp_path / "r.json"
    assert run([*command, "--store-dir", str(folder / "store"), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["record_bytes"][0] < trace.record_bytes[0]
    assert "int3" in complaint(capsys, "replay", str(folder / "trace"), "--format", "int3")
