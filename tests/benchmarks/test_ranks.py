"""What the benchmarks of several ranks say of their rows; links that take their time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.ranks import gpu, run
from benchmarks.ranks.limited import LimitedStore
from tests.runtime.fakes import ram_store
from tests.runtime.test_session import LAYERS, RECORD


def row(ranks: int, slots: int, mean_ms: float, tokens: list[int]) -> dict[str, Any]:
    return {
        "turn": 0,
        "ranks": ranks,
        "slots": slots,
        "experts_per_rank": 32 // ranks,
        "tpot_ms": {"p20": mean_ms, "p50": mean_ms, "p80": mean_ms},
        "mean_ms": mean_ms,
        "hit_rate": 0.5,
        "misses": 10,
        "misses_of_rank_0": 10 // ranks,
        "tokens": tokens,
    }


def result(two_ms: float, tokens: list[int]) -> dict[str, Any]:
    rows = [row(1, 8, 100.0, [1, 2]), row(2, 8, two_ms, tokens), row(2, 4, 70.0, [1, 2])]
    return {
        "schema": 1,
        "commit": "c" * 40,
        "machine": {"cpu": "a CPU", "cores": 2},
        "model": {"moe_layers": 8, "experts": [32], "top_k": 4},
        "miss_ms": 3.0,
        "ranks": 2,
        "slots": [8],
        "slots_in_all": [4],
        "all_reduce_us": [50.0],
        "rows": rows,
    }


@pytest.mark.parametrize(
    ("two_ms", "tokens", "holds"),
    [(60.0, [1, 2], [True, True]), (61.0, [1, 2], [False, True]), (50.0, [1, 3], [True, False])],
)
def test_claims_say_what_does_not_hold(two_ms: float, tokens: list[int], holds: list[bool]) -> None:
    assert [claim.holds for claim in run.claims(result(two_ms, tokens))] == holds


def test_the_page_labels_its_links_as_simulated() -> None:
    page = run.page(result(45.0, [1, 2]))
    assert "**The links are simulated**" in page
    assert "0.450. Holds." in page and "the time is 0.700 x" in page
    assert page.count("\n| ") == 4, "a head and a row for each case"


def test_a_limited_link_takes_its_time_for_every_record() -> None:
    store = LimitedStore(ram_store(LAYERS), RECORD / 0.02)
    record = torch.empty(RECORD, dtype=torch.uint8)
    began_s = time.perf_counter()
    for expert in range(3):
        store.read_into(0, expert, record)
    assert time.perf_counter() - began_s >= 0.06
    assert store.direct_reads_or_none() is None, "nobody reads past the limit"


def test_gpu_claims_ask_for_less_where_misses_do_not_decide() -> None:
    def cells(cache_ms: float) -> dict[str, Any]:
        times = {"cache_25": cache_ms, "resident": 10.0}
        return {"rows": {name: {"wall_ms": {"p50": ms}} for name, ms in times.items()}}

    rows = {
        "check|1 ranks": {"tokens": [1]},
        "check|2 ranks": {"tokens": [1]},
        "model|1024|turn 1|1 ranks": cells(40.0),
        "model|1024|turn 1|2 ranks": cells(20.0),
        "model|64|turn 1|1 ranks": cells(12.0),
        "model|64|turn 1|2 ranks": cells(12.3),
    }
    found = gpu.claims({"rows": rows, "ranks": 2})
    assert [claim.holds for claim in found] == [True] * 5
    bounds = ["0.6" in claim.text for claim in found if "cache_25" in claim.text]
    assert bounds == [True, False]


def test_gpus_that_are_not_there_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = torch.cuda.device_count() + 1
    assert gpu.main(["--out", str(tmp_path / "x.json"), "--ranks", str(missing)]) == 2
    assert "GPUs are needed" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
