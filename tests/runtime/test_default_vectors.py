"""Default vectors are the mean output of each expert, whatever batches it is learned from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specmoe_compile.predict.default_vectors import DefaultVectors

E, K, H = 6, 2, 8


def batch(seed: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Random ids [T, K] int64, distinct per token, and outputs y [T, K, H] float32."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, E, generator=generator).topk(K).indices
    return ids, torch.randn(tokens, K, H, generator=generator)


def learn(vectors: DefaultVectors, ids: Tensor, y: Tensor) -> None:
    vectors.update(0, ids, y, sorted(set(ids.flatten().tolist())))


@pytest.mark.parametrize("sizes", [[1] * 40, [40], [1, 17, 3, 19]])
def test_vectors_are_means_of_all_samples(sizes: list[int]) -> None:
    vectors = DefaultVectors([E], [H])
    batches = [batch(seed, tokens) for seed, tokens in enumerate(sizes)]
    for ids, y in batches:
        learn(vectors, ids, y)
    all_ids = torch.cat([ids.flatten() for ids, _ in batches])
    all_rows = torch.cat([y.view(-1, H) for _, y in batches])
    for expert in range(E):
        rows = all_rows[all_ids == expert]
        assert int(vectors.counts[0][expert]) == len(rows)
        torch.testing.assert_close(vectors.tables[0][expert], rows.mean(dim=0))


def test_vectors_are_zero_before_any_sample() -> None:
    vectors = DefaultVectors([E], [H])
    ids, _ = batch(0, 3)
    out = vectors.blend(0, ids, torch.ones(3, K), torch.empty(3, H))
    assert torch.equal(out, torch.zeros(3, H))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_blend_is_the_weighted_sum(tokens: int, dtype: torch.dtype) -> None:
    vectors = DefaultVectors([E], [H])
    vectors.load([torch.randn(E, H)])
    ids, _ = batch(0, tokens)
    weights = torch.rand(tokens, K).to(dtype)
    out = vectors.blend(0, ids, weights, torch.empty(tokens, H, dtype=dtype))
    expected = (vectors.tables[0][ids] * weights.float().unsqueeze(-1)).sum(dim=1)
    assert out.shape == (tokens, H)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected.to(dtype))


def test_experts_that_were_not_computed_do_not_count() -> None:
    vectors = DefaultVectors([E], [H])
    ids = torch.tensor([[0, 1], [2, 1]])
    y = torch.ones(2, K, H)
    y[:, 1] = float("nan")
    vectors.update(0, ids, y, [0, 2])
    assert vectors.counts[0].tolist() == [1, 0, 1, 0, 0, 0]
    assert torch.equal(vectors.tables[0][[0, 2]], torch.ones(2, H))
    assert torch.equal(vectors.tables[0][1], torch.zeros(H))


def test_learning_stops_at_enough_samples() -> None:
    vectors = DefaultVectors([E], [H], decode_samples=3, prefill_samples=20)
    ids = torch.tensor([[0, 1]])
    for value in (1.0, 2.0, 6.0, 100.0):
        vectors.update(0, ids, torch.full((1, K, H), value), [0, 1])
    assert vectors.counts[0][:2].tolist() == [3, 3]
    torch.testing.assert_close(vectors.tables[0][0], torch.full((H,), 3.0))
    vectors.update(0, torch.tensor([[0, 2]]), torch.full((1, K, H), 5.0), [0, 2])
    assert vectors.counts[0][:3].tolist() == [3, 3, 1]
    for _ in range(3):
        vectors.update(0, ids.repeat(17, 1), torch.full((17, K, H), 3.0), [0, 1])
    assert vectors.counts[0][:3].tolist() == [20, 20, 1]


def test_loaded_vectors_are_not_learned_over() -> None:
    vectors = DefaultVectors([E], [H])
    given = torch.randn(E, H)
    vectors.load([given])
    learn(vectors, *batch(0, 5))
    assert torch.equal(vectors.tables[0], given)


def test_vectors_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="model needs"):
        DefaultVectors([E], [H]).load([torch.zeros(E, H + 1)])
