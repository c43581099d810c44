"""Arms in turns within one process: what is counted, and that it is the same work."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kit.paired import ratio, run_paired
from benchmarks.kit.traffic import counted, summed
from specmoe_compile.bench.records import ArmJob
from tests.runtime import tiny_checkpoints

NEW_TOKENS = 7
PROMPTS = [[5, 17, 80, 3], [44, 9, 61, 2]]


@pytest.mark.usefixtures("prompts_left_to_the_model")
def test_turns_alternate_and_only_decode_steps_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoints.write("qwen3_moe", tmp_path / "model")
    jobs = {
        name: ArmJob(
            arm=arm,
            model=str(folder),
            prompts=PROMPTS,
            new_tokens=NEW_TOKENS,
            device="cpu",
            dtype="float32",
            expert_cache="50%",
            store_dir=str(tmp_path / "store"),
            options={"lowering": "eager", "auto_off": False, "prefetch": name == "with"},
            work_dir=str(tmp_path),
        )
        for name, arm in (("without", "on_demand"), ("with", "specmoe"))
    }
    arms, different = run_paired(jobs, rounds=2)
    assert different == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"{number}/2 {name}" for number in (1, 2) for name in jobs
    ]
    for name, arm in arms.items():
        steps = NEW_TOKENS - 1 - jobs[name].skip_tokens
        turns = [[len(turn.tpot_samples_ms) for turn in turns] for turns in arm.rounds]
        assert turns == [[steps] * 2] * 2
        totals = [counted(turns) for turns in arm.rounds]
        layers = [total["steps"] / (len(PROMPTS) * (NEW_TOKENS - 1)) for total in totals]
        assert len(set(layers)) == 1 and layers[0] == int(layers[0]), "a prefill would add steps"
        assert arm.total == summed(totals)
        assert arm.notes == [], "every turn runs the graphs of the warm-up"
    assert arms["without"].total["hits"] == 0 < arms["with"].total["hits"]
    assert arms["without"].total["needed"] == 0 < arms["with"].total["needed"]
    assert len(arms["with"].record()["turns_ms"]) == 2 * len(PROMPTS)


def test_a_drift_that_hits_both_arms_is_left_out() -> None:
    base = [10.0, 20.0, 40.0]
    found = ratio([9.0, 18.0, 36.0], base)
    assert (found.mean, found.error) == (pytest.approx(0.9), pytest.approx(0.0))
    assert str(ratio([10.0, 22.0], base[:2])) == "1.050 +- 0.050"
