"""kill -9 and Ctrl-C at random points of a pack, a load and a decode; two packs, one killed."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.common import TRIALS, Victim, records_or_none, save_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with Victim(tmp_path_factory.mktemp("cache")) as started:
        yield started


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("faults") / "model")


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
@pytest.mark.parametrize("what", ["pack", "load", "decode"])
def test_stopped_anywhere_nothing_is_wrong_afterwards(
    what: str, stop: signal.Signals, victim: Victim, model: Path, tmp_path: Path
) -> None:
    reference = victim.run("decode", model, tmp_path / "reference")
    assert reference["status"] == 0, reference
    records = records_or_none(tmp_path / "reference")
    # A load and a decode are hit with a store that is there, and with one that they have to pack.
    lasts_s = {
        ready: victim.run(what, model, tmp_path / name)["seconds"]
        for ready, name in ((False, "timed"), (True, "reference"))
    }
    chance = random.Random(f"{what} {stop}")
    hits, trial = 0, 0
    while hits < TRIALS:
        ready = what != "pack" and hits % 2 == 0
        store = tmp_path / ("reference" if ready else f"store-{trial}")
        trial += 1
        after_s = chance.uniform(0, lasts_s[ready])
        ended = victim.run(what, model, store, stop=[int(stop), after_s])
        if ended["status"] == 0:  # it was quicker than expected: the next one is hit earlier
            lasts_s[ready] = min(after_s, ended["seconds"])
        else:
            assert ended["status"] == (130 if stop == signal.SIGINT else -stop), (after_s, ended)
            hits += 1
        assert records_or_none(store) in (None, records), after_s
        again = victim.run("decode", model, store)
        assert (again["status"], again["said"]) == (0, reference["said"]), (after_s, again)
        assert records_or_none(store) == records
        leftovers = {path.name for path in store.iterdir()}
        assert leftovers <= {"experts.bin", "header.json", "packing.lock"}, after_s


def test_of_two_that_pack_one_is_killed_and_the_other_finishes(
    victim: Victim, model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reference = victim.run("decode", model, tmp_path / "reference")
    records = records_or_none(tmp_path / "reference")
    undisturbed = victim.run("pack", model, tmp_path / "timed")["seconds"]
    chance = random.Random(0)
    with Victim(tmp_path_factory.mktemp("other")) as other:
        other.run("pack", model, tmp_path / "warm")
        for trial in range(TRIALS):
            store = tmp_path / f"store-{trial}"
            victim.start(
                "pack", model, store, stop=[int(signal.SIGKILL), chance.uniform(0, undisturbed)]
            )
            time.sleep(chance.uniform(0, undisturbed / 2))
            survived = other.run("pack", model, store)
            assert victim.result()["status"] in (0, -signal.SIGKILL)
            assert survived["status"] == 0, survived
            assert records_or_none(store) == records
    assert victim.run("decode", model, store)["said"] == reference["said"]
