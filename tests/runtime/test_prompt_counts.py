"""What a prompt's routing says of the decoding behind it: counted token by token, and used."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from specmoe_compile.runtime.cache.eviction import PROMPT_TOKENS
from specmoe_compile.runtime.cache.slot_table import ExpertCache
from specmoe_compile.runtime.cpu.engine import CpuEngine
from specmoe_compile.runtime.cpu.native.library import library_or_none
from tests.runtime.cpu.test_native_policy import check_step, state
from tests.runtime.fakes import E, L, token_batch
from tests.runtime.test_session import make_session

TOP_K = 4


def tokens_of(rng: random.Random, experts: int, count: int) -> list[list[int]]:
    """Tokens whose experts are chosen unevenly, each its own."""
    weights = [1 / (1 + rank) for rank in range(experts)]
    rows = [list(dict.fromkeys(rng.choices(range(experts), weights, k=40))) for _ in range(count)]
    return [row[:TOP_K] for row in rows]


def adaptive(experts: int = 16, slots: int = 4, **kwargs: Any) -> ExpertCache:
    kwargs = {"policy": "adaptive", "spare": TOP_K, **kwargs}
    return ExpertCache(num_experts=[experts], slots=[slots], **kwargs)


@pytest.mark.parametrize("tokens", [0, 1, 17, PROMPT_TOKENS, PROMPT_TOKENS + 40])
@pytest.mark.parametrize("before", [0, 30])
def test_a_prompt_s_last_tokens_are_counted_as_steps_are(tokens: int, before: int) -> None:
    """Equal to noting one after the other, with an id of another rank's and one named twice."""
    rng = random.Random(tokens)
    at_once, by_step = adaptive(), adaptive()
    for table in (at_once, by_step):
        for wanted in tokens_of(random.Random(1), 16, before):
            table.plan(0, wanted)
    rows = tokens_of(rng, 16, tokens)
    for row in rows[::3]:
        row[2:] = [16, row[0]]
    slots = list(at_once.expert_of[0]), list(at_once.last_use[0])
    at_once.note_prompt(0, np.array(rows, np.int32).reshape(-1, TOP_K))
    for row in rows[-PROMPT_TOKENS:]:
        by_step.clock[0] += 1
        wanted = list(dict.fromkeys(expert for expert in row if expert < 16))
        by_step.scores[0].note(wanted, by_step.clock[0], 4, choose=False)
    assert state(at_once, 0) == state(by_step, 0)
    assert (list(at_once.expert_of[0]), list(at_once.last_use[0])) == slots
    assert at_once.clock[0] == before + min(tokens, PROMPT_TOKENS)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_other_policies_plan_a_prompt_as_one_step(policy: Any) -> None:
    rows = np.array(tokens_of(random.Random(0), 16, 40))
    experts = sorted(set(rows.reshape(-1).tolist()))
    tables = [adaptive(policy=policy) for _ in range(2)]
    assert tables[0].plan_prompt(0, experts, rows) == tables[1].plan(0, experts, bypass=True)
    assert state(tables[0], 0) == state(tables[1], 0)


def test_a_prompt_leaves_the_experts_that_it_used_most() -> None:
    rows = [[9, 3, token % 9, 10 + token % 5] for token in range(40)]
    table = adaptive()
    plan = table.plan_prompt(0, sorted({e for row in rows for e in row}), np.array(rows))
    assert {expert for expert, _ in plan.fills} >= {3, 9}
    assert len(plan.fills) == 4 and not plan.evicted
    again = table.plan_prompt(0, [15, 0], np.array([[0, 15, 0, 15]] * 20))
    assert again.bypassed == [0, 15] and not again.fills, "what is worth most comes first"
    assert not again.evicted, "a prompt evicts nothing"


def test_decoding_hits_more_after_a_prompt_that_was_counted() -> None:
    """Conversations in turn, each on other experts than the one before."""
    hits = {False: 0, True: 0}
    for counted in hits:
        rng, table = random.Random(0), adaptive(32, 8)
        for _ in range(12):
            names = list(range(32))
            rng.shuffle(names)
            rows = [[names[e] for e in row] for row in tokens_of(rng, 32, 260)]
            experts = sorted({expert for row in rows[:200] for expert in row})
            if counted:
                table.plan_prompt(0, experts, np.array(rows[:200]))
            else:
                table.plan(0, experts, bypass=True)
            hits[counted] += sum(len(table.plan(0, row).hits) for row in rows[200:])
    assert hits[True] > 1.1 * hits[False], hits


def test_steps_behind_a_prompt_are_the_same_in_cpp() -> None:
    if library_or_none() is None:
        pytest.skip("no C++ compiler")
    rng = random.Random(3)
    caches = [adaptive(32, 8) for _ in range(2)]
    for _ in range(4):
        prompt = tokens_of(rng, 32, rng.randint(17, 200))
        for cache in caches:
            cache.plan_prompt(0, sorted({e for row in prompt for e in row}), np.array(prompt))
        for wanted in tokens_of(rng, 32, 50):
            check_step(*caches, 0, wanted)


@pytest.mark.parametrize("cache", ["one_token", "half", "all"])
def test_a_session_counts_a_prompt_s_tokens(cache: str) -> None:
    """Steps of C++, if it is there, and prompts of Python on the same tables."""
    with make_session(cache) as session:
        engine = session.engine
        assert isinstance(engine, CpuEngine) and isinstance(engine.cache, ExpertCache)
        slots = len(engine.cache.expert_of[0])
        expected = adaptive(E, slots, spare=engine.cache.spare)
        for seed, tokens in enumerate([40, 1, 1, 17, 1, 200, 1, 1, 1]):
            batch = token_batch(seed, tokens)
            for layer in range(L):
                session.experts(layer, *batch)
            if tokens == 1:
                expected.plan(0, batch[1][0].tolist())
            else:
                wanted = batch[1].unique().tolist()
                expected.plan_prompt(0, wanted, batch[1].numpy())
        assert state(engine.cache, 0)[3:] == state(expected, 0)[3:]
        assert engine.cache.clock[0] == 9 + 40 + 17 + PROMPT_TOKENS
        total = session.stats.total
        assert total.steps == 9 * L, "counted tokens are no steps"
