"""A device session computes every form of experts module that transformers has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.cuda.opening import open_session as open_cuda_session
from specmoe_compile.runtime.session import Session
from tests.runtime.cuda.order_checker import unordered_pairs
from tests.runtime.cuda.stream_model import StreamModel
from tests.runtime.fakes import E, K, experts_layer, ram_store, randomise, reference, token_batch
from tests.runtime.test_session_expert_forms import FORMS, normed


def open_session(module: Any, streams: StreamModel, *, slots: int) -> Session:
    layer = experts_layer(0, module)
    return open_cuda_session(
        [layer],
        ram_store([layer]),
        device=torch.device("cpu"),
        expert_cache_bytes=slots * layer.layout.record_bytes,
        top_k=K,
        streams=streams,
    )


@pytest.mark.parametrize("transfer", ["gather", "copy"])
@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("form", FORMS)
def test_form_is_that_of_the_module(form: str, tokens: int, transfer: Any) -> None:
    module, streams = randomise(FORMS[form]()), StreamModel()
    batches = [token_batch(seed, tokens) for seed in range(3)]
    expected = [reference(module, *batch) for batch in batches]
    with open_session(module, streams, slots=E - 1) as session:
        session.configure(SessionOptions(transfer=transfer))
        for batch, out in zip(batches, expected, strict=True):
            torch.testing.assert_close(session.experts(0, *batch), out)
    streams.finish()
    assert not unordered_pairs(streams.ops)


@pytest.mark.parametrize("transfer", ["gather", "copy"])
def test_default_vectors_stand_in_behind_a_norm(transfer: Any) -> None:
    """The vectors are means of normed outputs: they are weighed as they are."""
    module = randomise(normed())
    x, ids, _ = token_batch(0, 1)
    weights = torch.tensor([[0.01] + [1.0] * (K - 1)])
    with open_session(module, StreamModel(), slots=E - 1) as session:
        config = SessionOptions(
            transfer=transfer, policy="default_vector", default_vector_threshold=0.1
        )
        session.configure(config)
        vectors = torch.randn(E, x.shape[1])
        session.default_vectors.load([vectors])
        out = session.experts(0, x, ids, weights)
        assert torch.allclose(out, reference(module, x, ids, weights), atol=1e-4)
        session.configure(SessionOptions(transfer="gather" if transfer == "copy" else "copy"))
        session.configure(config)  # the slots are empty again
        state = session.wait_prefetch(-1, 0, ids)
        partial = session.run_resident_experts(0, x, ids, weights, state)
        out = session.correct_experts(0, partial, x, ids, weights, state)
        assert session.stats.total.skipped_experts == 1
    left = reference(module, x, ids[:, 1:], weights[:, 1:])
    torch.testing.assert_close(out, left + 0.01 * vectors[ids[0, 0]])
