"""What the benchmarks of several ranks say of their rows; links that take their time."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kit.places import DOCUMENTS, RESULTS
from benchmarks.ranks import gpu
from benchmarks.ranks.figures import claims
from benchmarks.ranks.gpu_page import gpu_page
from benchmarks.ranks.groups import Group, Turns
from benchmarks.ranks.limited import LimitedStore
from benchmarks.ranks.page import page, results
from tests.runtime.fakes import ram_store
from tests.runtime.test_session import LAYERS, RECORD


def row(turn: int, ranks: int, slots: int, ms: float, tokens: list[int]) -> dict[str, Any]:
    return {
        "turn": turn,
        "ranks": ranks,
        "slots": slots,
        "experts_per_rank": 32 // ranks,
        "tpot_ms": {"p20": ms, "p50": ms, "p80": ms},
        "mean_ms": ms,
        "hit_rate": 0.5,
        "misses": 10,
        "misses_of_rank_0": 10 // ranks,
        "tokens": tokens,
    }


def result(two_ms: list[float], tokens: list[int]) -> dict[str, Any]:
    rows = []
    for turn, ms in enumerate(two_ms):
        # The machine is slower from turn to turn: ratios are of one.
        slow = 1.0 + turn
        rows += [row(turn, 1, 8, 100.0 * slow, [1, 2]), row(turn, 2, 8, ms * slow, tokens)]
        rows += [row(turn, 1, 4, 140.0 * slow, [1, 2]), row(turn, 2, 4, 70.0 * slow, [1, 2])]
    return {
        "schema": 1,
        "commit": "c" * 40,
        "machine": {"cpu": "a CPU", "cores": 2},
        "model": {"moe_layers": 8, "experts": [32], "top_k": 4},
        "miss_ms": 3.0,
        "ranks": 2,
        "slots": [4, 8],
        "tokens_timed": 27,
        "threads_per_rank": 1,
        "all_reduce_us": 50.0,
        "rows": rows,
    }


@pytest.mark.parametrize(
    ("two_ms", "tokens", "holds"),
    [
        ([60.0, 50.0, 90.0], [1, 2], [True, True, True]),
        ([61.0, 50.0, 90.0], [1, 2], [True, False, True]),
        ([50.0], [1, 3], [True, True, False]),
    ],
)
def test_claims_take_the_median_of_the_turns_ratios(
    two_ms: list[float], tokens: list[int], holds: list[bool]
) -> None:
    assert [claim.holds for claim in claims(result(two_ms, tokens))] == holds


def test_the_page_labels_its_links_as_simulated() -> None:
    found = result([45.0, 40.0, 50.0], [1, 2])
    text = page({"ranks_cpu_3ms.json": found})
    assert "**The links are simulated**" in text
    assert "0.450 (0.400 to 0.500). Holds." in text
    assert "0.700 (0.700 to 0.700) x its time: what links alone" in text
    assert text.count("\n| ") == 5, "a head and a row for each case"


def test_the_page_is_of_the_data() -> None:
    assert page(results(RESULTS)) == (DOCUMENTS / "ranks.md").read_text(encoding="utf-8")


def test_the_page_of_gpus_is_of_its_data() -> None:
    path = RESULTS / "ranks_gpu_h200.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    text = gpu_page(path.name, found, gpu.claims(found))
    assert text == (DOCUMENTS / "ranks_gpu.md").read_text(encoding="utf-8")


def test_the_page_of_gpus_tells_a_claim_that_does_not_hold() -> None:
    path = RESULTS / "ranks_gpu_h200.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    key = "Qwen3-30B-A3B-int4|1024|turn 1|resident"
    slow = {"p20": 9.0, "p50": 9.0, "p80": 9.0}
    found["rows"][f"{key}|2 ranks one_shot"]["wall_ms"] = slow
    assert "Fails" in gpu_page(path.name, found, gpu.claims(found))


PARENT = {"parent": os.getpid()}


def test_ranks_take_a_turn_for_each_that_is_asked_for(tmp_path: Path) -> None:
    turns = Turns({**PARENT, "folder": str(tmp_path)}, rank=0)
    other = Turns({**PARENT, "folder": str(tmp_path)}, rank=1)
    ask = tmp_path / "ask.json"
    for number in (1, 2):
        ask.write_text(json.dumps({"number": number, "ask": {"slots": 4 * number}}))
        assert turns.next_or_none() == other.next_or_none() == {"slots": 4 * number}
        other.answer({"no": "body hears it"})
        turns.answer({"turn": number})
        answer = tmp_path / f"answer-{number}.json"
        assert json.loads(answer.read_text()) == {"turn": number}
    ask.write_text(json.dumps({"number": 3, "ask": None}))
    assert turns.next_or_none() is None
    assert other.next_or_none() is None


def test_ranks_end_when_nobody_asks_any_more(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert Turns({"parent": gone.pid, "folder": str(tmp_path)}, rank=0).next_or_none() is None


def test_a_group_that_cannot_begin_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"1 ranks failed:\n.*No module named .*no_worker"):
        Group("benchmarks.ranks.no_worker", {}, 1, tmp_path).first()


def test_a_limited_link_takes_its_time_for_every_record() -> None:
    store = LimitedStore(ram_store(LAYERS), RECORD / 0.02)
    record = torch.empty(RECORD, dtype=torch.uint8)
    began_s = time.perf_counter()
    for expert in range(3):
        store.read_into(0, expert, record)
    assert time.perf_counter() - began_s >= 0.06
    assert store.direct_reads_or_none() is None, "nobody reads past the limit"


def test_gpu_claims_ask_for_less_where_misses_do_not_decide() -> None:
    def cell(ms: float) -> dict[str, Any]:
        return {"wall_ms": {"p50": ms}}

    rows = {"check|1 ranks": {"tokens": [1]}, "check|2 ranks": {"tokens": [1]}}
    for context, cache_ms, two_ms in ((1024, 40.0, 20.0), (64, 12.0, 12.3)):
        for name, one_ms, other_ms in (("cache_25", cache_ms, two_ms), ("resident", 10.0, 10.0)):
            case = f"model|{context}|turn 1|{name}"
            rows |= {f"{case}|1 ranks": cell(one_ms), f"{case}|2 ranks": cell(other_ms)}
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
