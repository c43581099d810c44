"""`gather_experts` against its reference: lists, tails, banks, strides, refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from specmoe_compile.kernels.gather_experts.kernel import launch_gather
from specmoe_compile.kernels.gather_experts.op import gather_experts
from specmoe_compile.kernels.gather_experts.reference import gather_experts_reference
from tests.kernels.expert_cases import DEVICE

POISON = 171
BYTES = torch.zeros(1, 1, dtype=torch.uint8)
Gather = Callable[..., None]


def _by_kernel(*args: Any, programs: int = 3) -> None:
    launch_gather(*args, programs=programs)


gathers = pytest.mark.parametrize("gather", [gather_experts, _by_kernel], ids=["op", "kernel"])


def _host(experts: int, record: int, *, padding: int = 0, offset: int = 0, seed: int = 0) -> Tensor:
    """Records in host memory that the device can read, `padding` bytes apart."""
    generator = torch.Generator().manual_seed(seed)
    size = offset + experts * (record + padding)
    flat = torch.randint(0, 255, (size,), dtype=torch.uint8, generator=generator)
    flat = flat.pin_memory() if DEVICE.type == "cuda" else flat
    return flat[offset:].view(experts, record + padding)[:, :record]


def _slots(slots: int, record: int, *, padding: int = 0) -> Tensor:
    whole = torch.full((slots, record + padding), POISON, dtype=torch.uint8, device=DEVICE)
    return whole[:, :record]


def _list(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def _check(gather: Gather, sources: list[Tensor], lists: tuple[Tensor, ...], **kwargs: Any) -> None:
    """Same slots as the reference, and the bytes between them untouched."""
    made = [_slots(5, source.shape[1], padding=48) for source in sources]
    expected = [slots.cpu().clone() for slots in made]
    gather_experts_reference(sources, expected, *(values.cpu() for values in lists))
    gather(sources, made, *lists, **kwargs)
    for slots, wanted in zip(made, expected, strict=True):
        assert torch.equal(slots.cpu(), wanted)
        between = slots.as_strided((4, 48), (slots.stride(0), 1), slots.shape[1])
        assert (between == POISON).all()


@gathers
@pytest.mark.parametrize("record", [1, 15, 16, 4096, 8191, 70000])
def test_records_of_any_size(gather: Gather, record: int) -> None:
    _check(gather, [_host(7, record)], (_list(6, 0, 3), _list(4, 2, 0), _list(3)))


@gathers
@pytest.mark.parametrize("programs", [1, 2, 7])
def test_any_grid_copies_the_same(gather: Gather, programs: int) -> None:
    lists = (_list(1, 4), _list(0, 3), _list(2))
    _check(gather, [_host(6, 20000)], lists, programs=programs)


@gathers
@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_only_as_many_as_the_count_says(gather: Gather, count: int) -> None:
    _check(gather, [_host(6, 500)], (_list(5, 4, 3, 2), _list(0, 1, 2, 3), _list(count)))


@gathers
def test_negative_entries_are_skipped(gather: Gather) -> None:
    _check(gather, [_host(6, 500)], (_list(5, -1, 3), _list(0, 1, -1), _list(3)))


@gathers
@pytest.mark.parametrize("banks", [2, 3, 4])
def test_banks_of_different_sizes(gather: Gather, banks: int) -> None:
    sources = [_host(6, size, seed=size) for size in (640, 4097, 16, 9000)[:banks]]
    _check(gather, sources, (_list(2, 5), _list(4, 1), _list(2)))


@gathers
@pytest.mark.parametrize(("padding", "offset"), [(16, 0), (3, 0), (0, 1), (5, 4)])
def test_strides_and_unaligned_addresses(gather: Gather, padding: int, offset: int) -> None:
    sources = [_host(6, 1000, padding=padding, offset=offset)]
    _check(gather, sources, (_list(2, 5), _list(4, 1), _list(2)))


def test_op_passes_opcheck() -> None:
    """On the CPU: opcheck's copies of the arguments are not pinned."""
    op = torch.ops.specmoe_kernels.gather_experts.default
    lists = (_list(2, 0).cpu(), _list(1, 2).cpu(), _list(2).cpu())
    args = ([_host(4, 64)], [torch.zeros(3, 64, dtype=torch.uint8)], *lists)
    # What is mutated is compared by autograd tests too, which integers do not have.
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_op_compiles_into_one_graph() -> None:
    source, lists = _host(6, 64), (_list(5, 0), _list(1, 2), _list(2))

    def gather(slots: Tensor) -> Tensor:
        gather_experts([source], [slots], *lists)
        return slots + 1

    compiled = torch.compile(gather, backend="aot_eager", fullgraph=True)
    slots, expected = _slots(3, 64), _slots(3, 64)
    assert torch.equal(compiled(slots), gather(expected))
    assert torch.equal(slots, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "got 0 sources and 1 destinations"),
        ({"sources": [torch.zeros(4, 64)]}, "sources[0] is float32, expected uint8"),
        ({"sources": [BYTES.expand(4, 65)]}, "sources[0] is (4, 65), expected [4, 64]"),
        ({"sources": [BYTES.repeat(64, 4).t()]}, "each slot of sources[0] must be contiguous"),
        ({"fill_slots": torch.zeros(2, dtype=torch.int64)}, "fill_slots is int64, expected int32"),
        ({"fill_slots": torch.zeros(3, dtype=torch.int32)}, "fill_slots is (3,), expected [2]"),
        ({"fill_experts": lambda: _list(0, 0, 0, 0)[::2]}, "fill_experts is not contiguous"),
        ({"fill_count": torch.zeros(2, dtype=torch.int32)}, "fill_count is (2,), expected [1]"),
        ({"programs": 0}, "programs is 0"),
    ],
)
def test_wrong_arguments_are_refused_with_one_sentence(
    change: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "sources": [_host(4, 64)],
        "destinations": [_slots(3, 64)],
        "fill_experts": _list(2, 0),
        "fill_slots": _list(1, 2),
        "fill_count": _list(2),
        "programs": 3,
    }
    moved = {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value
        for name, value in change.items()
    }
    moved |= {name: make() for name, make in change.items() if callable(make)}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as caught:
        gather_experts(**{**arguments, **moved})
    assert "\n" not in str(caught.value)


def test_overlapping_slots_are_refused() -> None:
    slots = torch.zeros(200, dtype=torch.uint8, device=DEVICE).as_strided((3, 64), (32, 1))
    with pytest.raises(ValueError, match="overlap"):
        gather_experts([_host(4, 64)], [slots], _list(2), _list(1), _list(1))


@pytest.mark.gpu
def test_unpinned_host_memory_is_refused() -> None:
    source = torch.zeros(4, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="pinned"):
        gather_experts([source], [_slots(3, 64)], _list(2), _list(1), _list(1))
