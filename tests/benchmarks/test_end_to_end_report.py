"""The published report: it judges what must hold by the figures in the result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.end_to_end.report import (
    README_END,
    README_START,
    disk_claims,
    startup_claims,
    timing_claims,
    write_readme_section,
    write_report,
)
from benchmarks.end_to_end.run import held_out_prompts
from benchmarks.end_to_end.tokens import compare_generations, token_claims
from specmoe_compile.bench.records import arm_record
from tests.cli.test_records import counters, run_of

MB = 1_000_000


def disk_arm(name: str, ms: float, *, misses: int = 30) -> dict[str, Any]:
    """An arm of one layer that decoded ten steps and read 1 MB per miss at 1 GB/s."""
    decode = counters(
        misses=misses, hits=40 - misses, steps=10, demand_bytes=misses * MB, busy_ms=float(misses)
    )
    run = run_of(tpot_samples_ms=[ms], decode=decode, peak_rss_bytes=650 * MB)
    return arm_record(name, [run], memory_cap_bytes=700 << 20)


def memory_arm(name: str, ms: float) -> dict[str, Any]:
    return arm_record(name, [run_of(tpot_samples_ms=[ms])], memory_cap_bytes=None)


def timing_of(arms: list[dict[str, Any]], *, disk_gbps: float = 1.1) -> dict[str, Any]:
    disk = {"record_bytes": 3 << 20, "gbps": {"1": 0.5, "4": disk_gbps}}
    return {
        "schema": 1,
        "commit": "a" * 40,
        "machine": {
            "cpu": "a CPU",
            "cores": 2,
            "ram_bytes": 1 << 30,
            "system": "Linux",
            "gpu": None,
        },
        "versions": {"torch": "2.13"},
        "model": {
            "name": "m",
            "bytes_per_expert": 3 << 20,
            "moe_layers": 1,
            "experts": [32],
            "top_k": 4,
            "expert_bytes": 805 * MB,
            "other_bytes": 2 * MB,
        },
        "arms": arms,
        "failed": {},
        "settings": {
            "new_tokens": 64,
            "repeats": 3,
            "warmup_tokens": 8,
            "skip_tokens": 4,
            "expert_cache": "25%",
        },
        "prompts": {"tokens": 64},
        "pack": {"peak_rss_bytes": 500 * MB, "reused": True},
        "disk": {
            "before": disk,
            "after": disk,
            "memory": {"read_gbps": 20.0, "gemv_bfloat16_gbps": 8.0, "gemv_float32_gbps": 9.0},
            "reader_threads": 4,
        },
        "load_average": [0.1, 0.1, 0.1],
    }


GOOD = {"accelerate": 900.0, "on_demand": 150.0, "cache": 60.0, "eager": 25.0, "resident": 10.0}


def arms_of(**times_ms: float) -> list[dict[str, Any]]:
    return [
        memory_arm(name, ms) if name in ("eager", "resident") else disk_arm(name, ms)
        for name, ms in {**GOOD, **times_ms}.items()
    ]


def verdicts(timing: dict[str, Any]) -> dict[str, bool]:
    return {claim.text: claim.holds for claim in timing_claims(timing, "float32")}


def test_good_figures_hold() -> None:
    found = verdicts(timing_of(arms_of()))
    assert len(found) == 6
    assert all(found.values()), found


@pytest.mark.parametrize(
    ("timing", "broken"),
    [
        (timing_of(arms_of(cache=91.0)), "10 times faster"),
        (timing_of(arms_of(resident=17.0)), "1.5 times faster"),
        (timing_of([*arms_of(), disk_arm("on_demand", 1.0, misses=41)]), "at most K experts"),
        ({**timing_of(arms_of()), "failed": {"cache": "killed"}}, "every arm ran"),
        (
            {**timing_of(arms_of()), "pack": {"peak_rss_bytes": 5000 * MB, "reused": False}},
            "peak RSS",
        ),
    ],
)
def test_each_figure_that_falls_short_is_named(timing: dict[str, Any], broken: str) -> None:
    failing = [text for text, holds in verdicts(timing).items() if not holds]
    assert failing
    assert all(broken in text for text in failing)


def test_a_cap_that_did_not_hold_breaks_the_comparison() -> None:
    arms = arms_of()
    for arm in arms:
        arm["memory_cap_bytes"] = None
    assert not all(verdicts(timing_of(arms)).values())


@pytest.mark.parametrize(("ours", "holds"), [([0.9, 1.8, 0.95], True), ([0.8, 1.6, 2.0], False)])
def test_reads_are_compared_with_the_disk_around_them(ours: list[float], holds: bool) -> None:
    found = {"disk_gbps": [1.0, 1.0, 3.0, 1.0], "on_demand_waiting_gbps": ours}
    found["on_demand_gbps"] = [0.1, 0.1, 0.1]
    (claim,) = disk_claims(found, "float32")
    assert claim.holds is holds, claim


def comparison(**changes: Any) -> dict[str, Any]:
    return {
        "tokens": 100,
        "differing_tokens": 0,
        "prompts": 2,
        "diverging_prompts": 0,
        "largest_margin_at_divergence": None,
        "median_logit_difference": 0.01,
        "largest_logit_difference": 0.1,
        "logit_range": 20.0,
        **changes,
    }


def tokens_of(hashes: dict[str, str], **changes: Any) -> dict[str, Any]:
    return {
        "arms": [{"name": name, "tokens_sha256": digest} for name, digest in hashes.items()],
        "comparison": {name: comparison(**changes) for name in hashes if name != "eager"},
    }


def test_float32_must_equal_the_unmodified_model() -> None:
    same = tokens_of({"eager": "x", "cache": "x", "resident": "x"})
    assert all(claim.holds for claim in token_claims(same, "float32"))
    other = tokens_of({"eager": "x", "cache": "y", "resident": "y"})
    assert [claim.holds for claim in token_claims(other, "float32")] == [True, False]
    split = tokens_of({"eager": "x", "cache": "x", "resident": "y"})
    assert [claim.holds for claim in token_claims(split, "float32")] == [False, False]


def test_bfloat16_must_agree_with_itself_and_be_as_near_as_another_order_of_sums() -> None:
    hashes = {"eager": "x", "eager_loop": "z", "cache": "y", "resident": "y"}
    near = tokens_of(hashes)
    assert all(claim.holds for claim in token_claims(near, "bfloat16"))
    for name in ("largest_logit_difference", "median_logit_difference"):
        far = tokens_of(hashes)
        far["comparison"]["resident"][name] *= 2.1
        assert [claim.holds for claim in token_claims(far, "bfloat16")] == [True, False]
        # The control has no bound of its own.
        far["comparison"]["eager_loop"][name] *= 3.0
        assert all(claim.holds for claim in token_claims(far, "bfloat16"))


@pytest.mark.parametrize(("second", "holds"), [(9.9, True), (10.0, False)])
def test_a_second_process_must_compile_for_less_than_half(second: float, holds: bool) -> None:
    pairs = [{"first_compile_s": first, "second_compile_s": second} for first in (90.0, 20.0, 1.0)]
    (claim,) = startup_claims({"pairs": pairs}, "float32")
    assert claim.holds is holds


def test_report_and_readme_are_written_from_the_files(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    path = results / "end_to_end_timing_float32.json"
    path.write_text(json.dumps(timing_of(arms_of())))
    report, readme = tmp_path / "report.md", tmp_path / "README.md"
    readme.write_text(f"before\n{README_START}\nSTALE\n{README_END}\nafter\n")
    assert write_report(results, report)
    write_readme_section(results, readme)
    text = report.read_text()
    assert "| float32: every arm ran | all | yes |" in text
    assert "900.0" in text
    shown = readme.read_text()
    assert shown.startswith("before\n")
    assert shown.endswith(f"{README_END}\nafter\n")
    assert "STALE" not in shown
    assert "| accelerate | 900.0 | 1.00x |" in shown


def test_a_report_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run the phases first"):
        write_report(tmp_path, tmp_path / "report.md")


def test_logits_are_compared_up_to_the_first_token_that_differs() -> None:
    logits = torch.tensor([[[0.0, 4.0, 1.0], [0.0, 2.0, 1.75], [9.0, 0.0, 0.0]]])
    other = logits.clone()
    other[0, 0, 1] += 0.5
    other[0, 1, 2] += 0.5  # now larger than 2.0: the second token differs
    other[0, 2] = 100.0  # another text by then: must not count
    found = compare_generations([[1, 1, 0]], logits, [[1, 2, 2]], other)
    assert found["differing_tokens"] == 2
    assert found["diverging_prompts"] == 1
    assert found["steps_compared"] == 2
    assert found["largest_logit_difference"] == 0.5
    assert found["median_logit_difference"] == 0.5
    assert found["largest_margin_at_divergence"] == 0.25
    assert found["logit_range"] == 4.0


def test_prompts_are_distinct_and_of_one_length() -> None:
    prompts = held_out_prompts(8)
    assert {len(prompt) for prompt in prompts} == {64}
    assert len({tuple(prompt) for prompt in prompts}) == 8
