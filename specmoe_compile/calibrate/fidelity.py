"""Fidelity: how far a policy's output is from the unmodified model's, and what it moves.

Two measurements per policy, both decoding one token at a time, as a user would:

- teacher-forced: held-out text is fed token by token; loss, agreement of the most likely token and
  KL divergence against the reference model's logits for the same text;
- greedy: prompts are continued freely and compared with the reference model's continuation.

Shape letters: N windows or prompts, W tokens per window, C tokens of context, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional

from specmoe_compile.api import stats
from specmoe_compile.errors import CompileError
from specmoe_compile.hf.compiled_calls import cache_argument
from specmoe_compile.options import CompileOptions, SessionOptions
from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.session import Session

PolicyName = Literal["exact", "default_vector", "commit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRun:
    """One policy to measure."""

    policy: PolicyName = "exact"
    """what a miss gets."""
    threshold: float = 0.0
    """router weight below which a miss gets its default vector, policy `default_vector`."""
    commit_weights: Literal["predicted", "true"] = "predicted"
    """router weights of policy `commit`."""
    skip_layers: tuple[int, ...] = ()
    """MoE layers that never speculate."""

    @property
    def name(self) -> str:
        """What tables call it."""
        text = {
            "exact": "exact",
            "default_vector": f"default_vector {self.threshold:g}",
            "commit": f"commit, {self.commit_weights} weights",
        }[self.policy]
        if self.skip_layers:
            text += f", skip {','.join(map(str, self.skip_layers))}"
        return text

    def config(self, options: CompileOptions) -> SessionOptions:
        """The session's configuration: this policy, everything else as in `options`.

        Prefetching that does not pay is not turned off: it would turn the policy off with it.
        """
        from dataclasses import replace

        return replace(
            SessionOptions.view(options),
            policy=self.policy,
            default_vector_threshold=self.threshold,
            commit_weights=self.commit_weights,
            skip_layers=self.skip_layers,
            auto_off=False,
        )


@dataclass(slots=True)
class Fidelity:
    """What one policy did; sums while measuring, ratios by property.

    Attributes:
        run: the policy.
        tokens: tokens predicted, teacher-forced.
        loss_sum, reference_loss_sum: negative log-likelihood of the text, nats.
        kl_sum: KL(reference || policy), nats.
        same_top: tokens whose most likely successor is the reference's.
        greedy_tokens: [prompt][new token] continuations.
        reference_tokens: the reference model's.
        decode_tokens: tokens behind the time and the counters below, teacher-forced.
        decode_ms: wall time of their steps.
        demand_bytes, speculative_bytes: read from the slow tier for them.
        hits, misses, skipped: experts by what became of them.
        needed, recalled: experts wanted and predicted, over all layers.
    """

    run: PolicyRun
    tokens: int = 0
    loss_sum: float = 0.0
    reference_loss_sum: float = 0.0
    kl_sum: float = 0.0
    same_top: int = 0
    greedy_tokens: list[list[int]] = field(default_factory=list)
    reference_tokens: list[list[int]] = field(default_factory=list)
    decode_tokens: int = 0
    decode_ms: float = 0.0
    demand_bytes: int = 0
    speculative_bytes: int = 0
    hits: int = 0
    misses: int = 0
    skipped: int = 0
    needed: int = 0
    recalled: int = 0

    def compare(self, logits: Tensor, reference: Tensor, targets: Tensor) -> None:
        """Take in logits [T, V] and the reference's for the same text, with its tokens [T]."""
        ours = functional.log_softmax(logits.float(), dim=-1)
        theirs = functional.log_softmax(reference.float(), dim=-1)
        self.tokens += len(targets)
        self.loss_sum += float(functional.nll_loss(ours, targets, reduction="sum"))
        self.reference_loss_sum += float(functional.nll_loss(theirs, targets, reduction="sum"))
        kl = functional.kl_div(ours, theirs, reduction="sum", log_target=True)
        self.kl_sum += float(kl)
        self.same_top += int((ours.argmax(-1) == theirs.argmax(-1)).sum())

    def count(self, before: LayerStats, after: LayerStats, tokens: int, ms: float) -> None:
        """Take in a session's totals around `tokens` decode steps, and how long they took."""
        self.decode_tokens += tokens
        self.decode_ms += ms
        self.demand_bytes += after.demand_bytes - before.demand_bytes
        self.speculative_bytes += after.speculative_bytes - before.speculative_bytes
        self.hits += after.hits - before.hits
        self.misses += after.misses - before.misses
        self.skipped += after.skipped_experts - before.skipped_experts
        self.needed += after.needed - before.needed
        self.recalled += after.recalled - before.recalled

    def as_dict(self) -> dict[str, Any]:
        """Ratios and totals as plain numbers."""
        pairs = list(zip(self.greedy_tokens, self.reference_tokens, strict=True))
        greedy = sum(len(ours) for ours, _ in pairs)
        same = sum(a == b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=False))
        tokens, decoded = max(1, self.tokens), max(1, self.decode_tokens)
        return {
            "name": self.run.name,
            "policy": self.run.policy,
            "threshold": self.run.threshold if self.run.policy == "default_vector" else None,
            "commit_weights": self.run.commit_weights if self.run.policy == "commit" else None,
            "skip_layers": list(self.run.skip_layers),
            "tokens": self.tokens,
            "loss_nats": self.loss_sum / tokens,
            "loss_increase_nats": (self.loss_sum - self.reference_loss_sum) / tokens,
            "kl_nats": self.kl_sum / tokens,
            "top1_agreement": self.same_top / tokens,
            "greedy_prompts": len(pairs),
            "greedy_tokens": greedy,
            "greedy_agreement": same / max(1, greedy),
            "greedy_same_prompts": sum(ours == theirs for ours, theirs in pairs),
            "greedy_first_difference": _mean([_first_difference(*pair) for pair in pairs]),
            "ms_per_token": self.decode_ms / decoded,
            "bytes_per_token": (self.demand_bytes + self.speculative_bytes) / decoded,
            "demand_bytes_per_token": self.demand_bytes / decoded,
            "speculative_bytes_per_token": self.speculative_bytes / decoded,
            "hit_rate": self.hits / max(1, self.hits + self.misses),
            "skipped_experts_per_token": self.skipped / decoded,
            "recall": self.recalled / self.needed if self.needed else None,
        }


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return place
    return min(len(ours), len(theirs))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


class Evaluator:
    """Measures policies of one offloaded model against a reference, on the same text.

    The graph is the same for all policies: it is compiled once, and the session is told each time.
    """

    def __init__(
        self,
        model: Any,
        session: Session,
        reference: Any,
        *,
        windows: Tensor,
        context: int,
        prompts: Tensor,
        new_tokens: int,
        options: CompileOptions,
    ) -> None:
        """Compile nothing yet.

        Args:
            model: offloaded model.
            session: the model's.
            reference: the unmodified model; or `model` itself, which is exact when it runs eagerly.
            windows: [N, W] int64 token ids of held-out text.
            context: C, tokens of each window that are read at once before decoding starts (< W).
            prompts: [N, W] int64 token ids to continue.
            new_tokens: tokens to generate per prompt.
            options: compile options; the policies' own fields are not read.
        """
        if not 0 < context < windows.shape[1]:
            raise ValueError(
                f"context={context}: expected 1 to {windows.shape[1] - 1}, to leave something of a"
                f" window of {windows.shape[1]} tokens to decode"
            )
        self._model, self._session, self._reference = model, session, reference
        self._windows, self._context = windows, context
        self._prompts, self._new_tokens = prompts, new_tokens
        self._options = options
        self._compiled: Any = torch.compile(
            model, backend="specmoe", options=_graph_options(options)
        )
        self._reference_tokens: list[list[int]] | None = None

    @property
    def steps_per_run(self) -> int:
        """Windows and prompts that one `measure` reports to `on_progress`."""
        return len(self._windows) + len(self._prompts)

    @torch.no_grad()
    def prepare(self) -> None:
        """Compile every graph and continue the prompts with the reference model.

        Compiling hands the session the compiled options, so it must not happen while a policy is
        being measured.
        """
        if self._reference_tokens is None:
            self._decode(self._windows[0])
            next(self._continuations(self._compiled))
            self._reference_tokens = list(self._continuations(self._reference))

    @torch.no_grad()
    def measure(self, run: PolicyRun, on_progress: Callable[[int], Any] | None = None) -> Fidelity:
        """Measure one policy.

        The first window is decoded once before anything is counted, so that the cache holds what
        this policy left in it and not the one before.

        Raises:
            CompileError: something was compiled meanwhile, which would have reset the policy.
        """
        self.prepare()
        assert self._reference_tokens is not None, "prepare() continues the prompts"
        self._session.configure(run.config(self._options))
        result = Fidelity(run, reference_tokens=self._reference_tokens)
        graphs = counters["stats"]["unique_graphs"]
        step = on_progress or (lambda done: None)
        self._decode(self._windows[0])
        for window in self._windows:
            reference = self._reference(input_ids=window[None], use_cache=False).logits[0]
            before, logits, after, ms = self._decode(window)
            # Logits at position t are of token t + 1.
            first, last = self._context, len(window)
            result.compare(logits, reference[first : last - 1], window[first + 1 :])
            result.count(before, after, last - 1 - first, ms)
            step(1)
        for tokens in self._continuations(self._compiled):
            result.greedy_tokens.append(tokens)
            step(1)
        if counters["stats"]["unique_graphs"] != graphs:
            raise CompileError(
                f"a graph was compiled while {run.name} was measured, which resets the policy: the"
                " measurement is void; windows and prompts must all have the same length"
            )
        return result

    def _decode(self, window: Tensor) -> tuple[LayerStats, Tensor, LayerStats, float]:
        """Read the context at once, then feed the rest of a window, [W], token by token.

        Returns:
            the session's totals before the first decode step, logits [W - 1 - C, V], the totals
            after the last, and the wall time between them in ms.
        """
        from transformers import StaticCache

        context = window[: self._context]
        cache = StaticCache(config=self._model.config, max_cache_len=len(window))
        kept = cache_argument(self._model, cache)
        everything = torch.arange(len(window))
        self._model(
            input_ids=context[None],
            **kept,
            position_ids=everything[None, : len(context)],
            cache_position=everything[: len(context)],
        )
        before = stats(self._model, all_ranks=True).total
        rows: list[Tensor] = []
        began_s = time.perf_counter()
        for place in range(len(context), len(window) - 1):
            out = self._compiled(
                input_ids=window[None, place : place + 1],
                **kept,
                position_ids=everything[None, place : place + 1],
                cache_position=everything[place : place + 1],
            )
            rows.append(out.logits[0, -1].clone())
        ms = (time.perf_counter() - began_s) * 1e3
        return before, torch.stack(rows), stats(self._model, all_ranks=True).total, ms

    def _continuations(self, model: Any) -> Iterator[list[int]]:
        for prompt in self._prompts:
            out = model.generate(
                prompt[None],
                max_new_tokens=self._new_tokens,
                min_new_tokens=self._new_tokens,
                do_sample=False,
                cache_implementation="static",
                pad_token_id=0,
            )
            yield out[0, len(prompt) :].tolist()


def _graph_options(options: CompileOptions) -> dict[str, Any]:
    """The options that shape the graph, and those that no policy sets.

    Policies need predictions, which the one graph of all of them has to make.
    """
    names = ("lookahead", "prefetch_width", "default_vectors", "lowering", "prefetch_budget_bytes")
    return {"prefetch": True, **{name: getattr(options, name) for name in names}}
