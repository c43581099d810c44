"""Hits in the first tokens after a prompt, by what of its routing is counted before. Simulated.

A conversation is a prompt and the tokens behind it, which are given. Each has an empty cache, or
finds what the one before it left, which was on another text. On a CPU a prompt fills empty slots;
on a GPU it passes by them.

Shape letters: L MoE layers, T tokens, K top-k.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.simulation.fast_replay import hits_from
from specmoe_compile.bench.machine import provenance
from specmoe_compile.runtime.cache.eviction import PROMPT_TOKENS, Policy
from specmoe_compile.runtime.cache.slot_table import ExpertCache

Recorded = Mapping[str, NDArray[np.int16]]
PROMPTS = (64, 256)
"""Tokens of a prompt."""
LOOKED_AT = 200
APART = 2000
"""Tokens from one conversation of a text to its next."""
EXPERTS, SPARE = 32, 4
SLOTS = (4, 6, 8, 12, 16, 24)
STARTS = ("empty", "in turn")
COUNTED = ("nothing", "one step", "last tokens", "all, judged")
"""Of a prompt: nothing; each expert once, as `lfu` does; PROMPT_TOKENS as steps, which `adaptive`
does; all tokens as steps, judged as steps of decoding are."""
ON_A_GPU = ("nothing, gpu", "last tokens, gpu")
OF_LFU = ("one step, lfu", "last tokens, lfu")
"""What policy `lfu` does, and what it would with the counts of `adaptive`."""


def conversation(table: ExpertCache, part: NDArray[np.int16], prompt: int, counted: str) -> int:
    """Hits of the tokens behind a prompt, [T, K]."""
    rows, slots = part[:prompt], len(table.expert_of[0])
    experts = np.unique(rows).tolist()
    if counted == "last tokens":
        table.plan_prompt(0, experts, rows)
    elif counted == "last tokens, gpu":
        table.note_prompt(0, rows)
    elif counted == "last tokens, lfu":
        table.scores[0].note_tokens(rows[-PROMPT_TOKENS:], table.clock[0] + 1)
        table.clock[0] += min(prompt, PROMPT_TOKENS)
        table.plan(0, experts, bypass=True)
    elif counted != "nothing, gpu":
        if counted == "all, judged":
            for wanted in rows.tolist():
                table.clock[0] += 1
                table.scores[0].note(wanted, table.clock[0], slots, choose=True)
        table.plan(0, experts, bypass=True, speculative=counted == "nothing")
    return sum(hits_from(table, part[prompt:].tolist()))


def rates(job: tuple[Recorded, int, int, str, str]) -> dict[str, float]:
    """Percent of hits by text, of all layers.

    Args:
        job: experts by text, [L, T, K] of one length; S; tokens of a prompt; one of STARTS; what is
            counted.
    """
    streams, slots, prompt, start, counted = job
    layers, length, top_k = next(iter(streams.values())).shape
    places = range(0, length - prompt - LOOKED_AT + 1, APART)
    totals = dict.fromkeys(streams, 0)

    policy: Policy = "lfu" if counted in OF_LFU else "adaptive"

    def new_table() -> ExpertCache:
        return ExpertCache(num_experts=[EXPERTS], slots=[slots], policy=policy, spare=SPARE)

    for layer in range(layers):
        table = new_table()
        for place in places:
            for name, stream in streams.items():
                if start == "empty":
                    table = new_table()
                part = stream[layer, place : place + prompt + LOOKED_AT]
                totals[name] += conversation(table, part, prompt, counted)
    choices = layers * len(places) * LOOKED_AT * top_k
    return {name: 100 * total / choices for name, total in totals.items()}


def try_prompts(recorded: Mapping[str, Tensor], pool: Any) -> dict[str, Any]:
    """Percent of hits by size, start and what is counted, with those of each text.

    Args:
        recorded: experts by text, [L, T, K]; `joined` is left out.
        pool: workers.
    """
    length = min(stream.shape[1] for stream in recorded.values())
    texts = {name: of[:, :length].numpy() for name, of in recorded.items() if name != "joined"}
    settings = list(itertools.product(STARTS, PROMPTS, SLOTS))
    kinds = (*COUNTED, *ON_A_GPU, *OF_LFU)
    jobs = [
        (texts, slots, prompt, start, kind) for start, prompt, slots in settings for kind in kinds
    ]
    found = iter(pool.map(rates, jobs, chunksize=1))
    rows = [
        {
            "start": start,
            "prompt": prompt,
            "slots": slots,
            "hits": {kind: next(found) for kind in kinds},
        }
        for start, prompt, slots in settings
    ]
    return {"commit": provenance()["commit"], "rows": rows}
