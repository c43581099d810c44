"""specmoe and FreeToken in one table: every row is kept, and the page shows what was measured."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.full_size import peers, peers_run, token
from benchmarks.full_size.peers_plot import CONTEXT_PANELS, PANELS, contexts_of, points_of
from benchmarks.full_size.peers_table import predicted_ms
from benchmarks.kit.places import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "results" / "peers_gpu.md"
SPREAD = {"p20": 9.0, "p50": 10.0, "p80": 11.0}


def token_file(path: Path, **cells: dict[str, Any]) -> Path:
    """A file of gpu_token; cells by arm."""
    common = {"wall_ms": SPREAD, "device_ms": 9.5, "gpu_bytes": 100, "store_bytes": 80}
    common |= {"hit_rate": 0.9, "missed_bytes_per_token": 5.0, "prefetch_records": None}
    common |= {"tokens_timed": 95}
    rows = {f"M-nvfp4|1024|{a}|attention on": {**common, **row} for a, row in cells.items()}
    rows["first_token|M-nvfp4|1024"] = {"first_token_s": 0.25}
    head = {"machine": {"cores": 2}, "versions": {"torch": "2.11"}}
    path.write_text(json.dumps({**head, "rows": rows}))
    return path


def freetoken_file(path: Path, **changes: Any) -> Path:
    row = {"model": "qwen_nvfp4", "strategy": "offload", "rate": 0.25, "context": 1024}
    row |= {"tpot": 8.0, "p20": 7.0, "p80": 9.0, "ttft": 300.0, "cache_GB": 4.1, "hit": 0.7}
    row |= {"reserved_GB": 8.0, "rss_GB": 17.8, "n": 48, **changes}
    path.write_text(json.dumps(row) + "\n")
    return path


def test_rows_of_both_systems_and_one_line_for_a_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(peers.FREETOKEN_MODELS, "qwen_nvfp4", ("M", "nvfp4"))
    out, slow = tmp_path / "peers.json", {**SPREAD, "p50": 10.5}
    ours = token_file(
        tmp_path / "token.json",
        cache_25={"slots_bytes": 20},
        resident={"slots_bytes": 80},
        specmoe_25={"slots_bytes": 20, "gpu_bytes": 40, "wall_ms": slow},
        lru_25={"slots_bytes": 20, "wall_ms": slow},
    )
    theirs = freetoken_file(tmp_path / "ft.jsonl")
    given = ["--lease", "A", "--commit", "abc", "--specmoe", str(ours), "--freetoken", str(theirs)]
    for _ in range(2):
        assert peers.main(["--out", str(out), *given, "--table"]) == 0
    result = json.loads(out.read_text())
    assert len(result["rows"]) == 5 and result["commits"] == ["abc"]
    gpu = {row["arm"]: row["gpu_bytes"] for row in result["rows"]}
    # The slots that the graph's largest arm has and this one leaves alone are not its memory.
    assert (gpu["cache_25"], gpu["resident"], gpu["specmoe_25"]) == (40, 100, 40)
    assert all(row["ttft_ms"] in (250.0, 300.0) and row["lease"] == "A" for row in result["rows"])
    _, _, quarter, whole, predicted = capsys.readouterr().out.splitlines()[-5:]
    assert "| 8.00 (7.00 to 9.00) A | 10.00" in quarter and quarter.endswith("| 1.25 |")
    assert "| 10.50 (9.00 to 11.00) A |" in quarter, "prefetch has its own column"
    assert whole.endswith("| - | - |") and "100 %" in whole
    assert predicted.startswith("M, nvfp4, 1024, cache_25 A: 10.00 ms, predicted 10.00 ")


def test_what_was_not_run_keeps_its_row_and_no_time(tmp_path: Path) -> None:
    path = freetoken_file(tmp_path / "ft.jsonl", error="OutOfMemoryError: no")
    (row,) = peers.freetoken_rows(path.read_text(), "A")
    assert row["not_run"] == "OutOfMemoryError: no" and "tpot_ms" not in row
    assert peers.table([row, some_row("specmoe", "resident", 3.0)])[2:] == [
        "| Qwen3-30B-A3B, nvfp4 | 1024 | 25 % | not run: OutOfMemoryError: no A | - | - |",
        "| M, nvfp4 | 1024 | 100 %, 4.0 GB | - | 3.00 (2.00 to 4.00) A | - |",
    ]
    key, reason = "M-nvfp4|1024|cache_8gb|attention on", {"attended_context": 1024, "not_run": "no"}
    (row,) = peers.specmoe_rows({"rows": {key: reason}}, "A", "abc")
    assert row["arm"] == "cache_8gb" and row["not_run"] == "no" and "tpot_ms" not in row


def test_memory_that_freetoken_does_not_tell_is_not_made_up(tmp_path: Path) -> None:
    path = freetoken_file(tmp_path / "ft.jsonl")
    told = json.loads(path.read_text())
    (row,) = peers.freetoken_rows(json.dumps(told), "A")
    assert row["gpu_bytes"] == 8_000_000_000
    del told["reserved_GB"]
    (row,) = peers.freetoken_rows(json.dumps(told), "A")
    assert row["gpu_bytes"] is None and row["tpot_ms"]["p50"] == 8.0


def some_row(system: str, arm: str, p50: float, **changes: Any) -> dict[str, Any]:
    spread = {"p20": p50 - 1, "p50": p50, "p80": p50 + 1}
    row = {"system": system, "arm": arm, "model": "M", "format": "nvfp4", "context": 1024}
    row |= {"routing": "trace", "cache_bytes": 4_000_000_000, "tpot_ms": spread, "lease": "A"}
    return {**row, **changes}


def test_all_rivals_stand_in_one_line_and_the_best_of_them_is_compared() -> None:
    runs = {"tpot_ms": {"p20": None, "p50": 6.0, "p80": None}, "runs_ms": [5.5, 6.0, 6.5]}
    rows = [
        some_row("specmoe", "cache_25", 3.0),
        some_row("freetoken", "offload_25", 8.0),
        some_row("llama.cpp", "cpu_moe_25", 6.0, format="q4_0", routing="own", **runs),
        some_row("accelerate", "device_map_25", 900.0, routing="own"),
        some_row("specmoe", "cache_25", 4.0, routing="uniform"),
        some_row("specmoe", "cache_16gb", 2.0),
        some_row("specmoe", "resident_no_products", 2.5),
        some_row("llama.cpp", "cpu_moe_0", 20.0, routing="own", cache_bytes=0),
    ]
    head, _, none, quarter, whole, card, uniform = peers.table(rows)
    assert head.startswith("| model, format | context | cache | FreeToken | llama.cpp | accelerate")
    assert "| 0 % | - | 20.00" in none and none.endswith("| - |")
    assert "| 25 %, 4.0 GB | 8.00 (7.00 to 9.00) A | q4_0: 6.00 (runs 5.50 to 6.50) A |" in quarter
    assert quarter.endswith("| 0.50 |"), "the fastest rival"
    assert "2.50 (1.50 to 3.50), without products A" in whole
    assert "| 16 GiB card, 4.0 GB |" in card
    assert uniform.startswith("| M, nvfp4, near-uniform routing | 1024 | 25 %")


def test_what_is_hidden_is_a_share_of_what_could_be() -> None:
    arms = {"resident": 4.0, "on_demand": 20.0, "prefetch_no_cache_most_1": 18.0}
    arms["prefetch_no_cache_most_4"] = 19.0
    rows = [some_row("specmoe", arm, p50) for arm, p50 in arms.items()]
    assert peers.paper_table(rows)[2:] == [
        "| M, nvfp4 | 1024 | 20.00 A | 18.00 | 10% | 20% | 50% |"
    ]
    assert peers.paper_table(rows[:2]) == [], "all three or none"
    assert len(peers.table(rows)) == 3, "they are no cell of the comparison"


def test_pictures_have_a_line_for_each_system_over_memory_and_context() -> None:
    runs = {"tpot_ms": {"p20": None, "p50": 6.0, "p80": None}, "runs_ms": [5.5, 6.0, 6.5]}
    rows = [
        some_row("specmoe", "cache_25", 3.0),
        some_row("specmoe", "specmoe_25", 2.5),
        some_row("specmoe", "cache_25", 9.0, routing="uniform"),
        some_row("specmoe", "on_demand", 90.0),
        some_row("specmoe", "cache_25", 4.0, context=65536),
        some_row("freetoken", "resident", 1.5, cache_bytes=None),
        some_row("llama.cpp", "cpu_moe_25", 6.0, format="q4_0", routing="own", **runs),
        some_row("accelerate", "device_map_25", 900.0, routing="own"),
    ]
    assert points_of(rows, ("M", "nvfp4", 1024)) == {
        "specmoe": [(4.0, 1.5, 2.5, 3.5)],
        "freetoken": [(4.0, 0.5, 1.5, 2.5)],
        "llama.cpp": [(4.0, 5.5, 6.0, 6.5)],
    }
    lines = contexts_of(rows, ("M", "nvfp4", "25 %"))
    assert lines["specmoe"] == [(1.0, 1.5, 2.5, 3.5), (64.0, 3.0, 4.0, 5.0)]
    assert set(lines) == {"specmoe", "llama.cpp"}


def asked(tmp_path: Path, **changes: Any) -> Namespace:
    values = {"folder": tmp_path, "cells": ["qwen_bf16"], "contexts": [1024], "trace": Path("t")}
    values |= {"llama_bench": Path("b"), "gguf_folder": Path("g"), "freetoken_driver": Path("d")}
    values |= {"freetoken_configs": Path("c"), "freetoken_tables": Path("f")}
    return Namespace(**{**values, **changes})


def test_a_run_has_a_piece_for_each_system_and_names_real_options(tmp_path: Path) -> None:
    found = {piece.name: piece.command for piece in peers_run.pieces(asked(tmp_path))}
    assert list(found) == [
        "qwen_bf16, specmoe, trace",
        "qwen_bf16, specmoe, uniform",
        "qwen_bf16, FreeToken offload",
        "qwen_bf16, FreeToken fused",
        "qwen_bf16, llama.cpp",
        "qwen_bf16, accelerate",
    ]
    token.parse(found["qwen_bf16, specmoe, trace"][4:])
    token.parse(found["qwen_bf16, specmoe, uniform"][4:])
    none = asked(tmp_path, llama_bench=None, freetoken_driver=None, cells=["qwen_4bit"])
    assert len(list(peers_run.pieces(none))) == 2
    row = {"model": "qwen_bf16", "strategy": "fused"}
    (tmp_path / "freetoken.jsonl").write_text(json.dumps(row) + "\n")
    assert "qwen_bf16, FreeToken fused" not in {p.name for p in peers_run.pieces(asked(tmp_path))}
    assert set(peers_run.CELLS["qwen_bf16"].llama or ()) == {"Qwen3-30B-A3B", "bf16"}


def test_a_run_goes_on_after_a_failure_and_begins_nothing_too_late(tmp_path: Path) -> None:
    out = tmp_path / "done"
    good = f"import sys; open({str(out)!r}, 'w').write(sys.argv[2])"
    todo = [
        peers_run.Piece("bad", (sys.executable, "-c", "raise SystemExit(3)"), budget=False),
        peers_run.Piece("good", (sys.executable, "-c", good)),
    ]
    assert peers_run.run(todo, 400.0) == ["bad"]
    assert 100 < float(out.read_text()) <= 400
    assert peers_run.run(todo, 1.0) == ["bad", "good"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--table"], "does not exist"),
        (["--specmoe", "x.json"], "--lease and --commit"),
        (["--freetoken", "x.jsonl", "--lease", "A"], "rows of specmoe"),
        (["--rivals", "x.jsonl", "--lease", "A"], "rows of specmoe"),
        (["--run", "--lease", "A"], "--folder, --lease and --commit"),
    ],
)
def test_what_is_missing_is_said(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "peers.json"
    assert peers.main(["--out", str(out), *arguments]) == 2
    assert said in capsys.readouterr().err and not out.exists()


def test_a_folder_with_rows_is_gone_on_with_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers_run, "run", lambda *_: [])
    folder, out = tmp_path / "run", tmp_path / "peers.json"
    folder.mkdir()
    rows = {"machine": {}, "versions": {}, "rows": {}}
    (folder / "token_qwen_4bit.json").write_text(json.dumps(rows), encoding="utf-8")
    given = ["--out", str(out), "--run", "--folder", str(folder), "--lease", "A", "--commit", "0"]
    assert peers.main(given) == 2
    assert "--resume" in capsys.readouterr().err and not out.exists()
    assert peers.main([*given, "--resume"]) == 0 and out.exists()


def test_the_page_shows_the_rows_that_were_measured() -> None:
    rows = json.loads((RESULTS / "peers_gpu.json").read_text(encoding="utf-8"))["rows"]
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line for line in peers.table(rows) if line not in page] == []
    predicted = [(row["tpot_ms"]["p50"], guess) for row, guess in predicted_ms(rows)]
    assert len(predicted) == 31 and all(-0.114 < p / m - 1 < 0.022 for m, p in predicted)
    assert sum(abs(p / m - 1) <= 0.1 for m, p in predicted) == 29
    for panel in PANELS:
        points = points_of(rows, panel)
        assert {"freetoken", "specmoe"} <= set(points) <= {"freetoken", "llama.cpp", "specmoe"}
        assert all(sorted(line) == line for line in points.values())
    assert contexts_of(rows, CONTEXT_PANELS[0])["specmoe"][-1][0] == 64.0
