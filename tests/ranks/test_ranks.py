"""Several processes that share a model's experts, on the CPU with gloo."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from specmoe_compile.hf.guard_checks import SURE
from tests.ranks.groups import (
    EXPERTS,
    LAYERS,
    WORKER,
    Group,
    needs_expert_parallel,
    run_groups,
    save_checkpoint,
    save_letters,
    torchrun,
)

pytestmark = needs_expert_parallel

SCENARIOS: list[dict[str, Any]] = [
    # These cannot add up in one shot; those of `eval`, below, are not asked to.
    {"name": "two", "ranks": 2, "compile": {"lowering": "eager", "sums": "one_shot"}},
    {
        "name": "one_shot",
        "ranks": 2,
        "inboxes_on_cpu": True,
        "compile": {"lowering": "eager", "sums": "one_shot"},
    },
    {"name": "replayed", "ranks": 2, "by_name": True, "new_tokens": 12},
    {"name": "sampling", "ranks": 2, "compile": None, "sample": True, "new_tokens": 5},
    {"name": "stores", "ranks": 2, "load_rank_1": {"quantize": "int8"}, "other_store": True},
    {"name": "killed", "ranks": 2, "compile": None, "dies_at_read": 12},
]
FAILURES: list[dict[str, Any]] = [
    {"name": "uneven", "ranks": 3},
    {"name": "packing", "ranks": 2, "load_rank_1": {"store_dir": "/dev/null/store"}},
    {"name": "prompts", "ranks": 2, "compile": None, "other_prompt": True},
]


TEXT = "the quick brown fox jumps over the lazy dog and then over another one "
COMMON = [
    "--expert-cache",
    "50%",
    "--store-dir",
    "{out}/commands",
    "--option",
    "lowering=eager",
    "--json",
]
COMMANDS: dict[str, list[str]] = {
    "generate": [
        *("generate", "{checkpoint}", "--device", "cpu", "--store", "disk", "--prompt", "a fox"),
        *("--no-compile", "--max-new-tokens", "6", *COMMON, "{out}/generate.json"),
    ],
    "eval": [
        *("eval", "{checkpoint}", "--text", "{out}/text.txt", "--policy", "exact"),
        *("--policy", "default_vector=0.3", "--tokens", "10", "--window", "16", "--context", "6"),
        *("--prompts", "2", "--prompt-tokens", "6", "--new-tokens", "4", *COMMON),
        "{out}/eval.json",
    ],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    save_letters(folder)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    (folder / "text.txt").write_text(TEXT * 2)
    return folder


@pytest.fixture(scope="module")
def groups(out: Path, checkpoint: Path) -> dict[str, Group]:
    commands = [
        {
            "name": name,
            "ranks": 2,
            "command": [part.format(out=out, checkpoint=checkpoint) for part in command],
        }
        for name, command in COMMANDS.items()
    ]
    return run_groups(out, checkpoint, [*SCENARIOS, *commands])


def test_two_ranks_give_the_plain_tokens_from_one_store(groups: dict[str, Group]) -> None:
    found = groups["two"].checked()
    for rank, one in enumerate(found):
        assert one["tokens"] == one["expected"], "tokens differ from the plain model's"
        assert not one["breaks"]
        assert len(one["sums"]) >= 1 and all(count >= LAYERS for count in one["sums"])
        assert one["own"] == [EXPERTS // 2] * LAYERS
        assert one["split_weights"] == 0, "checked anew at every call"
        experts = {expert for _, expert in one["reads"]}
        assert experts and experts <= set(range(rank * 4, rank * 4 + 4)), "reads only its own"
        assert sum(layer["predicted"] for layer in one["stats"]["layers"]) > 0
    assert sum(sum(one["packed"]) for one in found) == 1, "packed once"


def test_sums_in_one_shot_give_the_same_tokens(groups: dict[str, Group]) -> None:
    for one in groups["one_shot"].checked():
        assert one["tokens"] == one["expected"], "tokens differ from the plain model's"
        assert one["one_shot"] >= 2 * LAYERS, "of attention and experts"


def test_steps_of_ranks_call_their_graph_without_dynamo(groups: dict[str, Group]) -> None:
    for one in groups["replayed"].checked():
        assert one["tokens"] == one["expected"], "tokens differ from the plain model's"
        assert one["replayed"] == 11 - SURE, "all but the first, which are checked"


def test_ranks_that_cannot_add_up_in_one_shot_say_so_and_reduce(groups: dict[str, Group]) -> None:
    for one, told in zip(groups["two"].checked(), groups["two"].errors, strict=True):
        assert one["one_shot"] == 0
        assert told.count("add up by all-reduce, not in one shot: the model is on cpu") == 1


def test_statistics_of_all_ranks_add_up(groups: dict[str, Group]) -> None:
    found = groups["two"].checked()
    for name in ("misses", "demand_bytes", "store_bytes", "fast_tier_bytes", "steps", "needed"):
        total = sum(one["stats"][name] for one in found)
        assert all(one["stats_of_all"][name] == total for one in found), name
    assert found[0]["stats"]["misses"] != found[1]["stats"]["misses"]


def test_sampling_draws_the_same_tokens_on_every_rank(groups: dict[str, Group]) -> None:
    first, second = groups["sampling"].checked()
    assert first["tokens"] == second["tokens"]
    # As the plain model draws them from the first rank's seed.
    assert first["tokens"] == first["expected"]


def test_stores_that_differ_are_refused_by_every_rank(groups: dict[str, Group]) -> None:
    group = groups["stores"]
    assert group.statuses == [1, 1]
    for text in group.errors:
        assert "The ranks opened different expert stores" in text.splitlines()[-1]


def test_a_rank_that_is_killed_ends_the_others_with_a_sentence(groups: dict[str, Group]) -> None:
    group = groups["killed"]
    assert group.statuses == [1, -9], group.errors[0][-3000:]
    last = group.errors[0].splitlines()
    said = next(line for line in reversed(last) if "SpecMoEError" in line)
    assert re.search(r"Rank 0 of 2 lost another rank: that process ended", said)
    assert "This is typically" not in said, "the library's advice is left out"


@pytest.mark.parametrize(
    ("name", "heading"), [("generate", "6 tokens after a prompt of 5"), ("eval", "exact")]
)
def test_a_command_prints_and_writes_once(
    name: str, heading: str, groups: dict[str, Group], out: Path
) -> None:
    group = groups[name]
    assert [one["status"] for one in group.checked()] == [0, 0], group.errors
    assert heading in group.errors[0]  # what it printed is there too
    assert group.errors[1] == ""
    written = json.loads((out / f"{name}.json").read_text())
    store = groups["two"].checked()[0]["stats_of_all"]["store_bytes"]
    if name == "generate":
        assert len(written["tokens"]) == 6 and written["stats"]["store_bytes"] == store
        return
    exact, approximate = written["policies"]
    assert exact["greedy_agreement"] == exact["top1_agreement"] == 1.0
    assert abs(exact["loss_increase_nats"]) < 1e-4 and written["store_bytes"] == store
    assert approximate["skipped_experts_per_token"] > 0


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> dict[str, Group]:
    return run_groups(tmp_path_factory.mktemp("failures"), checkpoint, FAILURES)


@pytest.mark.slow
def test_an_uneven_split_is_refused_by_every_rank(failures: dict[str, Group]) -> None:
    group = failures["uneven"]
    assert group.statuses == [1, 1, 1]
    for text in group.errors:
        assert "UnsupportedModelError" in text
        assert "processes as divide the experts" in text.splitlines()[-1]


@pytest.mark.slow
def test_a_rank_that_cannot_pack_ends_all_with_its_own_error(failures: dict[str, Group]) -> None:
    group = failures["packing"]
    assert group.statuses == [1, 1]
    own = group.errors[1].splitlines()[-1]
    told = group.errors[0].splitlines()[-1]
    assert "StoreError" in own and "/dev/null" in own
    assert "Rank 1 of 2 failed packing the experts" in told and own.split(": ", 1)[1] in told


@pytest.mark.slow
def test_prompts_that_differ_are_refused_by_every_rank(failures: dict[str, Group]) -> None:
    group = failures["prompts"]
    assert group.statuses == [1, 1]
    for text in group.errors:
        assert "other arguments on rank 1 than on rank 0" in text.splitlines()[-1]


@pytest.mark.slow
def test_torchrun_starts_and_ends_them(tmp_path: Path, checkpoint: Path) -> None:
    scenario = {
        "checkpoint": str(checkpoint),
        "store_dir": str(tmp_path / "store"),
        "compile": None,
        "new_tokens": 4,
    }
    ended = torchrun(2, WORKER, json.dumps(scenario), str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-6000:]
    for rank in range(2):
        one = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert one["tokens"] == one["expected"]
    ended = torchrun(2, WORKER, json.dumps({**scenario, "dies_at_read": 5}), str(tmp_path))
    assert ended.returncode != 0
    assert "lost another rank" in ended.stderr or "SIGKILL" in ended.stderr
