"""The server's own cost: one model in one process, in turns with and without HTTP around it.

Two processes differ by more than a server costs, so all arms share one: `alone` calls `generate`
with a cache of the server's size and a streamer that does nothing, `served` streams the same tokens
to the real client, which is a process of its own. `alone` is there twice, before and after: what
lies between the two is noise, and a machine that grows slower or faster favours neither.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

ARMS = ("alone", "served", "alone_again")


def stream_times(url: str, prompt: str, tokens: int) -> tuple[float, float]:
    """One streamed completion as its client sees it: ms to the first text, ms from there on."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
    started = time.perf_counter()
    first = None
    for _chunk in client.completions.create(
        model="m", prompt=prompt, max_tokens=tokens, temperature=0, stream=True
    ):
        first = first or time.perf_counter()
    assert first is not None, "the stream was empty"
    return (first - started) * 1e3, (time.perf_counter() - first) * 1e3


def many_clients(url: str, prompt: str, tokens: int, clients: int, requests: int) -> float:
    """Seconds in which so many clients at once had so many answers together."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda own: stream_times(url, own, tokens), prompts(prompt, requests)))
    return time.perf_counter() - started


class Side:
    """One compiled model, called both ways."""

    def __init__(self, model: str, context: int, threads: int | None, **settings: Any) -> None:
        """Load, compile and listen.

        Args:
            model: folder or hub name.
            context: length of the caches of keys and values, in tokens.
            threads: PyTorch's threads; None is its own choice.
            settings: arguments of `specmoe_compile.from_pretrained`.
        """
        import torch
        from transformers import StaticCache

        import specmoe_compile
        from specmoe_compile.cli.tokenizer import load_tokenizer
        from specmoe_compile.serve.app import make_app
        from specmoe_compile.serve.engine import Engine
        from specmoe_compile.serve.metrics import Metrics
        from specmoe_compile.serve.server import Server, bind, warm_up

        if threads is not None:
            torch.set_num_threads(threads)
        self._tokenizer = load_tokenizer(model)
        self._inner: Any = specmoe_compile.from_pretrained(model, **settings)
        self._compiled: Any = torch.compile(self._inner, backend="specmoe")
        self._cache: Any = StaticCache(config=self._inner.config, max_cache_len=context)
        metrics = Metrics()
        self._engine = Engine(
            self._compiled,
            self._tokenizer,
            max_context=context,
            max_queue=16,
            threads=threads,
            on_first_token=metrics.on_first_token,
            on_token=metrics.on_token,
            on_job=lambda: metrics.note_stats(specmoe_compile.stats(self._inner)),
        )
        warm_up(self._engine)
        app = make_app(self._engine, metrics, name="m", api_key=None, loopback_only=True)
        bound = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        self._http = Server(app, self._engine, "ready")
        self._thread = threading.Thread(target=self._http.run, kwargs={"sockets": [bound]})
        self._thread.start()

    def alone(self, prompt: str, tokens: int) -> tuple[float, float]:
        """`generate` with nothing around it: ms to the first token, ms from there to its end."""
        import torch

        from specmoe_compile.hf.compiled_calls import cache_argument

        ids = self._tokenizer(prompt, return_tensors="pt").input_ids.to(self._inner.device)
        self._cache.reset()
        stamps = _Stamps()
        started = time.perf_counter()
        self._compiled.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            streamer=stamps,
            pad_token_id=self._tokenizer.pad_token_id,
            **cache_argument(self._inner, self._cache),
        )
        first = stamps.seen_s[1]  # the prompt comes before it
        return (first - started) * 1e3, (time.perf_counter() - first) * 1e3

    def close(self) -> None:
        """End the server and close the stores."""
        import specmoe_compile

        self._http.should_exit = True
        self._thread.join()
        self._engine.stop()
        self._engine.join(10)
        specmoe_compile.close(self._inner)


class _Stamps:
    """A streamer that notes when the first token came, and does nothing else."""

    def __init__(self) -> None:
        self.seen_s: list[float] = []

    def put(self, value: Any) -> None:
        if len(self.seen_s) < 2:
            self.seen_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def own_cost(
    side: Side, prompt: str, tokens: int, *, seconds: float, least: int = 4
) -> dict[str, Any]:
    """Measure the arms in turns, back and forth, for so many seconds.

    Returns:
        Mean time per token of each turn by arm, in ms; `served` over the mean of the two turns
        around it, and `alone_again` over `alone`: medians and their standard errors.
    """
    turns: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with client_process() as pool:
        calls: dict[str, Callable[[], tuple[float, float]]] = {
            "alone": lambda: side.alone(prompt, tokens),
            "served": lambda: pool.submit(stream_times, side.url, prompt, tokens).result(),
            "alone_again": lambda: side.alone(prompt, tokens),
        }
        for arm in ARMS:
            calls[arm]()  # not counted
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s or len(turns["alone"]) < least:
            for arm in ARMS if len(turns["alone"]) % 2 else reversed(ARMS):
                turns[arm].append(calls[arm]()[1] / (tokens - 1))
    return {
        "tokens": tokens,
        "tpot_ms": {arm: statistics.median(turns[arm]) for arm in ARMS},
        "over_alone": {
            "served": over(
                turns["served"],
                [sum(each) / 2 for each in zip(turns["alone"], turns["alone_again"], strict=True)],
            ),
            "alone_again": over(turns["alone_again"], turns["alone"]),
        },
        "turns_ms": {arm: [round(ms, 4) for ms in turns[arm]] for arm in ARMS},
    }


def load(
    side: Side, prompt: str, tokens: int, *, clients: Sequence[int], rounds: int, requests: int
) -> list[dict[str, Any]]:
    """Tokens per second of `generate` alone and of so many clients, in turns: a row each.

    Args:
        side: the model.
        prompt: text.
        tokens: of each answer.
        clients: numbers of clients; a row each.
        rounds: turns of each row, after one that is not counted.
        requests: of each turn, all clients together.
    """
    rates: dict[int, list[float]] = {count: [] for count in (0, *clients)}  # 0: alone
    with client_process() as pool:
        for turn in range(rounds + 1):
            for count in list(rates) if turn % 2 else reversed(rates):
                if count:
                    asked = (side.url, prompt, tokens, count, requests)
                    seconds = pool.submit(many_clients, *asked).result()
                else:
                    own = prompts(prompt, requests)
                    seconds = sum(sum(side.alone(each, tokens)) for each in own) / 1e3
                if turn:
                    rates[count].append(requests * tokens / seconds)
    return [
        {"clients": count, "tokens_per_s": statistics.median(each), "turns": each}
        for count, each in rates.items()
    ]


def prompts(prompt: str, requests: int) -> list[str]:
    """As many prompts with beginnings of their own, which no other one left in the cache."""
    return [f"{number} {prompt}" for number in range(requests)]


def client_process() -> ProcessPoolExecutor:
    """A process for clients, which costs the server no interpreter lock."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def over(ours_ms: Sequence[float], base_ms: Sequence[float]) -> dict[str, float]:
    """Median of the ratios of paired turns; its standard error by drawing them again."""
    ratios = [ours / base for ours, base in zip(ours_ms, base_ms, strict=True)]
    rng = random.Random(0)
    drawn = [statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(1000)]
    return {"median": statistics.median(ratios), "error": statistics.stdev(drawn)}
