"""Products by the CPU engine: against float64, with odd sizes, shared by threads or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import specmoe_compile.ops
from specmoe_compile.runtime.cpu.one_thread import MAX_BYTES, on_one_thread
from specmoe_compile.runtime.session import Session
from tests.runtime.test_session import make_session

pytestmark = pytest.mark.usefixtures("tiny_experts")

products = torch.ops.specmoe.products
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The second are shared: 4 MiB and more in any dtype.
SIZES = (((5, 1, 33), 40), ((1030, 2000, 7), 1024))


def operands(
    tokens: int, sizes: tuple[int, ...], inputs: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return random(tokens, inputs), [random(n, inputs) for n in sizes], [random(n) for n in sizes]


def assert_products(
    session: Session, x: Tensor, weights: list[Tensor], biases: list[Tensor]
) -> None:
    got = products(x, weights, biases, session.handle)
    assert len(got) == len(weights)
    for i, (out, weight) in enumerate(zip(got, weights, strict=True)):
        want = x.double() @ weight.double().t()
        if biases:
            want = want + biases[i].double()
        assert out.dtype == x.dtype and out.shape == want.shape and out.is_contiguous()
        scale = x.double().abs() @ weight.double().abs().t() + 1
        # Rounded once to the dtype, whose numbers have so many bits.
        error = (out.double() - want).abs() / scale
        assert error.max() <= torch.finfo(x.dtype).eps + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize(("sizes", "inputs"), SIZES)
def test_products_are_those_of_float64(
    sizes: tuple[int, ...], inputs: int, tokens: int, dtype: torch.dtype, monkeypatch: object
) -> None:
    x, weights, biases = operands(tokens, sizes, inputs, dtype)
    with make_session("in_place") as session:
        assert session.engine.multiplies
        assert_products(session, x, weights, [])
        assert_products(session, x, weights, biases)


def test_the_engine_computes_them_and_python_what_it_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    multiply = torch.mm

    def counted(*args: Tensor) -> Tensor:
        calls.append(len(args[0]))
        return multiply(*args)

    monkeypatch.setattr(torch, "mm", counted)
    with make_session("in_place") as session:
        handle = session.handle
        for tokens in (1, 16):
            x, weights, _ = operands(tokens, (5, 7), 40, torch.float32)
            products(x, weights, [], handle)
        assert not calls
        x, weights, _ = operands(17, (5, 7), 40, torch.float32)
        assert_products(session, x, weights, [])
        assert_products(session, x[:3], [w.t().contiguous().t() for w in weights], [])
        assert calls == [17, 17, 3, 3]
    assert_after_close(x[:1], weights, handle)


def assert_after_close(x: Tensor, weights: list[Tensor], handle: int) -> None:
    (out, _) = products(x, weights, [], handle)
    torch.testing.assert_close(out, x @ weights[0].t())


def test_special_values_and_empty_bias_lists() -> None:
    x = torch.tensor([[float("inf"), 1.0], [float("nan"), 1.0]])
    with make_session("in_place") as session:
        (out,) = products(x, [torch.tensor([[1.0, 1.0]])], [], session.handle)
    assert out[0].isinf().all() and out[1].isnan().all()


def test_biases_that_are_not_one_for_each_are_refused() -> None:
    x, weights, biases = operands(1, (5, 7), 40, torch.float32)
    with pytest.raises(ValueError, match="1 biases for 2 weights"):
        specmoe_compile.ops._products_fake(x, weights, biases[:1], 0)


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_step_with_few_keys_has_one_thread(two_threads: object) -> None:
    few = torch.zeros(1, 1, 4, 8)
    seen = []

    def step(*given: Tensor) -> int:
        seen.append(torch.get_num_threads())
        if given[0].numel() == 0:
            raise RuntimeError("a step that fails")
        return 5

    call = on_one_thread(step, [torch.zeros(2), few])
    assert call(torch.zeros(2), few) == 5
    many = torch.empty(1, 1, MAX_BYTES // 32 + 1, 8)
    assert call(torch.zeros(2), many) == 5
    with pytest.raises(RuntimeError):
        call(torch.zeros(0), few)
    assert seen == [1, 2, 1] and torch.get_num_threads() == 2
    assert on_one_thread(step, [few], attends=True)(many) == 5
    assert seen.pop() == 1


def test_a_step_without_keys_stays_as_it_is() -> None:
    def step() -> None: ...

    assert on_one_thread(step, [torch.zeros(2, 2), torch.zeros(1, 1, 2, 2).long(), 5]) is step
