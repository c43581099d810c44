"""`benchmarks.cpu_disk.run`: what it derives from its cells, and what its document says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.cpu_disk.figures import drift, figures, read_results
from benchmarks.cpu_disk.report import write_report
from tests.benchmarks.cpu_disk_cells import cell_of, phase_of, write


def test_a_peer_that_stopped_early_is_compared_over_the_same_tokens(tmp_path: Path) -> None:
    tight = phase_of(
        cell_of("specmoe", 10.0, size="12.5%", cap=True),
        # faster than all of specmoe's tokens, slower than its first ones
        {
            **cell_of("llama_cpp", 9.0, size="12.5%", cap=True, short=True),
            "first_tpot_ms": {"p20": 30.0, "p50": 30.0, "p80": 30.0},
        },
        cell_of("resident", 5.0),
    )
    write_report(write(tmp_path, tight=tight), tmp_path / "d.md")
    text = (tmp_path / "d.md").read_text()
    assert "| llama_cpp | 9.0 (8.5..9.5)* |" in text
    assert (
        "the first 16 tokens of each prompt only. Over the same tokens: specmoe 12.5% 20.0" in text
    )
    assert "Nowhere in this run" in text
    assert "process that stays alive for all turns of a cell, each turn after a warm-up:" in text
    assert "`specmoe`, `resident`" in text
    assert "at most 0.01 cores" in text
    assert "A process for each run: `llama_cpp`." in text


def test_the_limit_is_the_larger_of_reading_and_computing() -> None:
    # 4 MB at 0.5 GB/s take 8 ms; computing takes 5
    reads = cell_of("cache", 12.0, size="25%", missed=4_000_000, stall_ms=6.0, link_gbps=0.5)
    computes = cell_of("specmoe", 5.5, size="50%", missed=1_000_000)
    phase = phase_of(reads, computes, cell_of("resident", 5.0))
    own = figures(reads, phase)
    assert own.limit_ms == pytest.approx(8.0)
    assert own.distance == pytest.approx(1.5)
    assert (own.compute_ms, own.stall_ms, own.overhead_ms) == pytest.approx((5.0, 6.0, 1.0))
    own = figures(computes, phase)
    assert own.limit_ms == pytest.approx(5.0)
    assert own.distance == pytest.approx(1.1)


def test_wrong_guesses_do_not_count_in_the_limits_favour_and_right_ones_do() -> None:
    cell = cell_of("specmoe", 20.0, missed=4_000_000, useful=3_000_000, wasted=9_000_000)
    own = figures(cell, phase_of(cell, cell_of("resident", 5.0)))
    assert own.missed_bytes == 7_000_000
    assert own.read_bytes == 16_000_000
    assert own.limit_ms == pytest.approx(7.0)


def test_a_peer_is_held_against_what_the_kernel_read_for_it() -> None:
    peer = cell_of("mmap", 20.0, missed=10_000_000)
    own = figures(peer, phase_of(peer, cell_of("resident", 5.0)))
    assert (own.missed_bytes, own.stall_ms, own.overhead_ms) == (10_000_000, None, None)
    assert own.distance == pytest.approx(2.0)


def test_results_of_an_older_schema_are_refused(tmp_path: Path) -> None:
    write(tmp_path, tight=phase_of(cell_of("resident", 5.0), schema=1))
    with pytest.raises(ValueError, match=r"schema 1, expected 2: run .* --only tight"):
        read_results(tmp_path)


def test_limits_need_the_resident_cell() -> None:
    cell = cell_of("cache", 20.0)
    with pytest.raises(ValueError, match="no cell 'resident'"):
        figures(cell, phase_of(cell))


def test_drift_is_slowest_over_fastest() -> None:
    assert drift(phase_of()) == pytest.approx(1.1)
    assert drift(phase_of(sentinel={"cell": "c", "medians_ms": [10.0, None]})) is None


@pytest.fixture()
def results(tmp_path: Path) -> Path:
    tight = phase_of(
        cell_of("mmap", 30.0, size="5%", cap=True, missed=20_000_000),
        cell_of("specmoe", 20.0, size="12.5%", cap=True, missed=15_000_000, stall_ms=10.0),
        cell_of("llama_cpp", 15.0, size="12.5%", cap=True, missed=15_000_000),
        cell_of("resident", 5.0),
        refused={"5%": "expert_cache='5%' is too small."},
    )
    uncapped = phase_of(
        cell_of("eager", 13.0),
        cell_of("mmap", 13.0),
        cell_of("specmoe", 12.0, size="25%", missed=1_000_000, label="always"),
        cell_of("resident", 5.0),
        failed={"llama_cpp": "The arm llama_cpp needs the packages gguf and llama-cpp-python."},
    )
    return write(tmp_path, tight=tight, uncapped=uncapped)


def test_the_document_says_what_was_refused_what_failed_and_who_wins(results: Path) -> None:
    report = results / "docs" / "cpu-disk.md"
    write_report(results, report)
    text = report.read_text()
    assert "| ms/token | 5% | 12.5% |" in text
    assert "| specmoe | refused | 20.0 (19.5..20.5) |" in text
    assert "A cache of 5%: expert_cache='5%' is too small." in text
    assert "- llama_cpp did not run: The arm llama_cpp needs the packages" in text
    winners = text.partition("## Where a peer wins")[2].partition("##")[0]
    assert "| llama_cpp 12.5%, capped | 15.0 ms | specmoe 12.5%, capped: 20.0 ms |" in winners
    # without a cap the peers meet what specmoe does there, the resident arm included
    assert "mmap" not in winners
    assert "| specmoe 12.5%, capped | 20.0 | 14.3 MiB | 1.00 | 15.0 | **1.33**" in text
    assert "| recall | - | 75.0 % |" in text
    assert "| tight | cache 25% | 10.0, 11.0, 10.0 | 1.10 |" in text
    for name in ("tpot", "split", "limit", "recall"):
        assert f"](cpu-disk-{name}.png)" in text
        assert report.with_name(f"cpu-disk-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "cpu-disk-loss.png" not in text


def test_the_goal_is_judged_for_specmoe_only(tmp_path: Path) -> None:
    roomy = phase_of(
        cell_of("specmoe", 5.4, size="100%", cap=True),
        cell_of("cache", 5.4, size="50%", cap=True),
        cell_of("resident", 5.0),
    )
    write_report(write(tmp_path, roomy=roomy), tmp_path / "d.md")
    lines = (tmp_path / "d.md").read_text().partition("## Distance")[2].splitlines()
    goals = {
        line.split("|")[1].strip(): line.split("|")[-2].strip() for line in lines if "|" in line
    }
    assert goals["specmoe 100%, capped"] == "yes"
    assert goals["cache 50%, capped"] == goals["resident"] == "-"


def test_a_report_without_results_ends_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileNotFoundError):
        read_results(tmp_path)
    arguments = ["--only", "report", "--results", str(tmp_path), "--report", str(tmp_path / "r.md")]
    assert main(["cpu_disk", *arguments]) == 2
    assert "run the phases first" in capsys.readouterr().err
    assert not (tmp_path / "r.md").exists()
