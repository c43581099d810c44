"""Policy exact against the unmodified model: every batch size and cache kind, and bad predictors.

Shapes: T tokens of a step, K top-k, P predicted experts per token, E experts, L MoE layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import specmoe_compile
from benchmarks.end_to_end.run import EXPERT_CACHE
from specmoe_compile.hf.attach import session_of
from specmoe_compile.runtime.cache.statistics import LayerStats, Stats
from specmoe_compile.runtime.session import Session

BATCHES = (1, 4)
CACHES = ("static", "dynamic")
SABOTAGES = ("wrong", "random", "empty")
LOOKAHEAD = "lookahead router"


PREDICTORS: tuple[str | None, ...] = (None, *SABOTAGES)
"""What predicts; None is the lookahead router itself, and goes first: it records the routing."""


class Predictor:
    """Stands between a session's graph and its speculator: watches routing, replaces predictions.

    `wrong` needs to know the true experts before the router has run: they are those of an earlier
    run of the same prompts, whose tokens are the same as long as the policy is exact.
    """

    def __init__(self, session: Session) -> None:
        """Take the place of the speculator's `start` and `settle`."""
        self._speculator: Any = session.engine
        self._num_experts = session.store.num_experts
        self._start, self._settle = self._speculator.start, self._speculator.settle
        vars(self._speculator).update(start=self.start, settle=self.settle)
        self.kind: str | None = None
        self.recorded: list[list[Tensor]] = [[] for _ in session.layers]
        self._place = [0] * len(session.layers)
        self._generator = torch.Generator().manual_seed(0)

    def begin(self, kind: str | None) -> None:
        """Start a run: None records the true routing, a name of `SABOTAGES` replays it."""
        self.kind = kind
        self._place = [0] * len(self._place)
        if kind is None:
            self.recorded = [[] for _ in self.recorded]

    def start(self, layer: int, ids: Tensor, weights: Tensor) -> int:
        """Hand on a prediction, [T, P], or a bad one in its place."""
        if self.kind is not None:
            ids, weights = self._bad(layer, ids, weights)
        number: int = self._start(layer, ids, weights)
        return number

    def settle(self, number: int, layer: int, ids: Tensor) -> int:
        """Watch the true ids, [T, K]."""
        if self.kind is None:
            self.recorded[layer].append(ids.clone())
        self._place[layer] += 1
        state: int = self._settle(number, layer, ids)
        return state

    def _bad(self, layer: int, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "empty":
            return ids[:, :0], weights[:, :0]
        scores = torch.rand(ids.shape[0], self._num_experts[layer], generator=self._generator)
        if self.kind == "wrong":
            scores[:, self.recorded[layer][self._place[layer]].flatten()] = -1.0
        return scores.topk(ids.shape[1]).indices, weights


def run_exact(
    model: Path,
    store_dir: Path,
    prompts: list[list[int]],
    new_tokens: int,
    batches: Sequence[int],
    on_row: Callable[[dict[str, Any]], None],
) -> None:
    """Compare greedy tokens of every combination with the unmodified model's.

    Args:
        model: checkpoint folder. store_dir: its expert store, made when it is not there.
        prompts: token ids, all of one length. new_tokens: per prompt.
        batches: of `BATCHES`.
        on_row: gets all rows so far, after each combination.
    """
    references = _references(model, prompts, new_tokens, batches)
    inner: Any = specmoe_compile.from_pretrained(
        model,
        device="cpu",
        dtype="float32",
        store="disk",
        expert_cache=EXPERT_CACHE,
        store_dir=store_dir,
        progress=False,
    )
    session = session_of(inner)
    predictor = Predictor(session)
    rows: list[dict[str, Any]] = []
    about = {
        "expert_cache": EXPERT_CACHE,
        "new_tokens": new_tokens,
        "store_filesystem": _filesystem(store_dir),
    }
    for batch in batches:
        for cache in CACHES:
            torch._dynamo.reset()
            compiled = torch.compile(
                inner, backend="specmoe", options={"prefetch": True, "auto_off": False}
            )
            for kind in PREDICTORS:
                predictor.begin(kind)
                session.reset_stats()
                started_s = time.perf_counter()
                tokens = _generate(compiled, prompts, new_tokens, batch, cache)
                rows.append(
                    {
                        "batch": batch,
                        "kv_cache": cache,
                        "predictor": kind or LOOKAHEAD,
                        **_counted(tokens, references[batch], specmoe_compile.stats(inner)),
                        "seconds": time.perf_counter() - started_s,
                    }
                )
                print(rows[-1], flush=True)
                on_row({"rows": rows, **about})
    session.close()


def _counted(tokens: Tensor, reference: Tensor, stats: Stats) -> dict[str, Any]:
    """Tokens [N, new_tokens] that are not the reference's, and what was predicted meanwhile."""
    pairs = zip(tokens.flatten(), reference.flatten(), strict=True)
    return {
        "tokens": tokens.numel(),
        "differing_tokens": sum(int(a != b) for a, b in pairs),
        "recall": _recall(stats.total),
        "recall_by_layer": [_recall(layer) for layer in stats.layers],
        "prefetches": stats.total.prefetches,
    }


def _recall(layer: LayerStats) -> float | None:
    return layer.recalled / layer.needed if layer.needed else None


def merged(kept: dict[str, Any] | None, made: dict[str, Any], commit: str | None) -> dict[str, Any]:
    """Add the rows of a run to those of an earlier one, each with its commit and file system.

    Args:
        kept: the result file as it is, or None. Its rows of the same batch size, kind of cache and
            predictor give way.
        made: what `run_exact` hands on. commit: of the code that made it.
    """

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["batch"], row["kv_cache"], row["predictor"]

    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    if kept is not None:
        place = {name: kept[name] for name in ("commit", "store_filesystem")}
        rows |= {key(row): {**place, **row} for row in kept["rows"]}
    place = {"commit": commit, "store_filesystem": made["store_filesystem"]}
    rows |= {key(row): {**row, **place} for row in made["rows"]}
    return {**made, "rows": list(rows.values())}


def _filesystem(folder: Path) -> str:
    """Type of the file system that a folder is on, such as ext4; tmpfs is one in memory."""
    folder = folder.resolve()
    mounts = [p for p in psutil.disk_partitions(all=True) if folder.is_relative_to(p.mountpoint)]
    return str(max(mounts, key=lambda mount: len(mount.mountpoint)).fstype)


def _references(
    model: Path, prompts: list[list[int]], new_tokens: int, batches: Sequence[int]
) -> dict[int, Tensor]:
    """The unmodified model's tokens, [N, new_tokens], by batch size."""
    loader: Any = AutoModelForCausalLM
    plain = loader.from_pretrained(model, dtype=torch.float32).eval()
    return {batch: _generate(plain, prompts, new_tokens, batch, None) for batch in batches}


def _generate(
    model: Any, prompts: Sequence[list[int]], new_tokens: int, batch: int, cache: str | None
) -> Tensor:
    """Greedy continuations, [N, new_tokens], padded with -1 after an end."""
    out = torch.full((len(prompts), new_tokens), -1, dtype=torch.int64)
    kwargs = {} if cache is None else {"cache_implementation": cache}
    for start in range(0, len(prompts), batch):
        ids = torch.tensor(prompts[start : start + batch])
        made = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, **kwargs)
        made = made[:, ids.shape[1] :]
        out[start : start + len(ids), : made.shape[1]] = made
    return out
