"""specmoe and FreeToken in one table: every row is kept, and the page shows what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.full_size import peers
from benchmarks.full_size.peers_plot import PANELS, points_of
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
    assert len(peers.table([row])) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--table"], "does not exist"),
        (["--specmoe", "x.json"], "--lease and --commit"),
        (["--freetoken", "x.jsonl", "--lease", "A"], "rows of specmoe"),
    ],
)
def test_what_is_missing_is_said(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "peers.json"
    assert peers.main(["--out", str(out), *arguments]) == 2
    assert said in capsys.readouterr().err and not out.exists()


def test_the_page_shows_the_rows_that_were_measured() -> None:
    rows = json.loads((RESULTS / "peers_gpu.json").read_text(encoding="utf-8"))["rows"]
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line for line in peers.table(rows) if line not in page] == []
    predicted = [(row["tpot_ms"]["p50"], guess) for row, guess in peers.predicted_ms(rows)]
    assert len(predicted) == 10 and all(-0.103 < p / m - 1 < 0.02 for m, p in predicted)
    for panel in PANELS:
        points = points_of(rows, panel)
        assert set(points) == {"freetoken", "specmoe"}
        assert all(sorted(line) == line for line in points.values())
