"""Policy `commit` on a device runs what the same policy runs on the CPU."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.cuda.opening import open_session as open_cuda_session
from specmoe_compile.runtime.session import Session
from tests.runtime.cuda.order_checker import unordered_pairs
from tests.runtime.cuda.stream_model import StreamModel
from tests.runtime.fakes import E, K, L, ram_store, token_batch
from tests.runtime.split_path import predict, step
from tests.runtime.test_session import LAYERS, RECORD, make_session

KINDS = ("right", "wrong", "random", "wide", "empty")


def open_device_session(streams: StreamModel) -> Session:
    return open_cuda_session(
        LAYERS,
        ram_store(LAYERS),
        device=torch.device("cpu"),
        expert_cache_bytes=L * (E - 1) * RECORD,
        top_k=K,
        streams=streams,
    )


@pytest.mark.parametrize("transfer", ["gather", "copy"])
@pytest.mark.parametrize("commit_weights", ["predicted", "true"])
def test_a_device_runs_what_the_cpu_runs(commit_weights: Any, transfer: Any) -> None:
    config = SessionOptions(policy="commit", commit_weights=commit_weights)
    streams, generator = StreamModel(), random.Random(0)
    with make_session("half") as host, open_device_session(streams) as device:
        host.configure(config)
        device.configure(replace(config, transfer=transfer))
        for number, kind in enumerate(3 * KINDS):
            batch = token_batch(number, 1 if kind == "wide" else 1 + number % 3)
            guess = [part[:, : E - 1] for part in predict(kind, batch, generator)]
            tickets = [opened.start_prefetch(1, *guess) for opened in (host, device)]
            expected, out = (
                step(opened, 1, batch, ticket)  # type: ignore[arg-type]
                for opened, ticket in zip((host, device), tickets, strict=True)
            )
            torch.testing.assert_close(out, expected)
            streams.finish()
            left_out = [opened.stats.total.skipped_experts for opened in (host, device)]
            assert left_out[0] == left_out[1], (kind, left_out)
        assert left_out[0] > 0
        device.reset_stats()
        assert device.stats.total.skipped_experts == 0
    assert not unordered_pairs(streams.ops)


def test_what_is_committed_to_is_fetched_ahead_whole() -> None:
    streams = StreamModel()
    with open_device_session(streams) as session:
        session.configure(SessionOptions(policy="commit", transfer="gather"))
        x, ids, weights = token_batch(0, 1)
        guess = predict("wrong", (x, ids, weights), random.Random(0))
        step(session, 1, (x, ids, weights), session.start_prefetch(1, *guess))  # type: ignore[arg-type]
        streams.finish()
        total = session.stats.total
    assert (total.prefetches, total.misses, total.skipped_experts) == (K, 0, K)


@pytest.mark.parametrize("case", ["skipped layer", "other batch", "whole layer at once"])
def test_a_step_without_a_prediction_of_its_own_is_exact(case: str) -> None:
    streams = StreamModel()
    skip = (1,) if case == "skipped layer" else ()
    with open_device_session(streams) as session:
        session.configure(SessionOptions(policy="commit", skip_layers=skip, transfer="gather"))
        x, ids, weights = token_batch(0, 2)
        guess, guess_weights = predict("wrong", (x, ids, weights), random.Random(0))
        rows = 1 if case == "other batch" else 2
        ticket = session.start_prefetch(1, guess[:rows], guess_weights[:rows])
        if case == "whole layer at once":
            out = session.experts(1, x, ids, weights)
        else:
            out = step(session, 1, (x, ids, weights), ticket)  # type: ignore[arg-type]
        session.configure(SessionOptions(transfer="gather"))
        expected = session.experts(1, x, ids, weights)
        streams.finish()
        assert session.stats.total.skipped_experts == 0
    torch.testing.assert_close(out, expected)
