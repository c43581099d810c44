"""Op `gather_experts`: copies the records of a device-side list of experts into cache slots.

On CUDA the device itself reads the records from host memory; list and count stay on the device, so
that nothing waits and a decode step with its fetches can be one CUDA graph.

Shape letters: E experts, S slots, N fills at most, R bytes of a record.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specmoe_compile.kernels.checks import check_bank, check_tensor, require_triton
from specmoe_compile.kernels.common_torch import LIBRARY, implement
from specmoe_compile.kernels.gather_experts.reference import gather_experts_reference

_NAME = "gather_experts"
LIBRARY.define(
    f"{_NAME}(Tensor[] sources, Tensor(a!)[] destinations, Tensor fill_experts,"
    " Tensor fill_slots, Tensor fill_count, *, int programs=32) -> ()"
)

MAX_BANKS = 4
# Offsets within a record are 32 bits wide.
MAX_RECORD_BYTES = 2**31 - 2**16
DEFAULT_PROGRAMS = 32


def gather_experts(
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    fill_experts: Tensor,
    fill_slots: Tensor,
    fill_count: Tensor,
    *,
    programs: int = DEFAULT_PROGRAMS,
) -> None:
    """For each i below the count: destinations[b][fill_slots[i]] = sources[b][fill_experts[i]].

    One launch on the current stream; never waits for the device. Every source must stay alive and
    pinned, and no slot of the list may be used, until the launch has ended. Slots that are not in
    the list are not touched.

    Args:
        sources: one to four banks [E, R] uint8, R may differ between banks; each expert's record
            contiguous, any stride between records. On the device of `destinations`, or in pinned
            host memory (allocated so, or registered with cudaHostRegister).
        destinations: as many banks [S, R] uint8, on one device; each slot contiguous, slots do not
            overlap.
        fill_experts: [N] int32, contiguous, on the device of `destinations`.
        fill_slots: [N] int32, likewise. No slot twice. Entries with a negative slot or expert are
            skipped; other values are trusted on CUDA.
        fill_count: [1] int32, likewise, 0 to N.
        programs: size of the launch, whatever the count; each has 128 threads.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or layout, there are
            no banks or too many, or a source is host memory that the device cannot read.
        SpecMoEError: CUDA tensors without Triton.

    Notes:
        Fastest where records, their strides and all addresses are multiples of 16 bytes; an address
        or stride that is no multiple of 4 costs most of the speed.
    """
    torch.ops.specmoe_kernels.gather_experts(
        list(sources), list(destinations), fill_experts, fill_slots, fill_count, programs=programs
    )


def _check(
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    fill_experts: Tensor,
    fill_slots: Tensor,
    fill_count: Tensor,
    *,
    programs: int = DEFAULT_PROGRAMS,
) -> None:
    if len(sources) != len(destinations) or not 1 <= len(sources) <= MAX_BANKS:
        raise ValueError(
            f"specmoe_kernels::{_NAME}: got {len(sources)} sources and {len(destinations)}"
            f" destinations, expected 1 to {MAX_BANKS} pairs"
        )
    if programs < 1:
        raise ValueError(f"specmoe_kernels::{_NAME}: programs is {programs}, expected at least 1")
    experts, slots = sources[0].shape[:1], destinations[0].shape[:1]
    for bank, (source, destination) in enumerate(zip(sources, destinations, strict=True)):
        name = f"destinations[{bank}]"
        check_bank(_NAME, name, destination, (*slots, "R"), (torch.uint8,), like=destinations[0])
        record = (*experts, destination.shape[1])
        check_bank(_NAME, f"sources[{bank}]", source, record, (torch.uint8,))
        if source.device.type != "cpu" and source.device != destination.device:
            raise ValueError(
                f"specmoe_kernels::{_NAME}: sources[{bank}] is on {source.device}, expected"
                f" {destination.device} or pinned host memory"
            )
        if destination.stride(0) < destination.shape[1] and destination.shape[0] > 1:
            raise ValueError(
                f"specmoe_kernels::{_NAME}: slots of {name} overlap, they are"
                f" {destination.stride(0)} bytes apart and {destination.shape[1]} bytes long"
            )
        if destination.shape[1] > MAX_RECORD_BYTES:
            raise ValueError(
                f"specmoe_kernels::{_NAME}: a record of {name} has {destination.shape[1]} bytes,"
                f" expected at most {MAX_RECORD_BYTES}; split it over several banks"
            )
    check_tensor(_NAME, "fill_experts", fill_experts, ("N",), (torch.int32,), like=destinations[0])
    for name, tensor in (("fill_slots", fill_slots), ("fill_count", fill_count)):
        shape = tuple(fill_experts.shape) if name == "fill_slots" else (1,)
        check_tensor(_NAME, name, tensor, shape, (torch.int32,), like=destinations[0])


def _cpu(
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    fill_experts: Tensor,
    fill_slots: Tensor,
    fill_count: Tensor,
    *,
    programs: int = DEFAULT_PROGRAMS,
) -> None:
    _check(sources, destinations, fill_experts, fill_slots, fill_count, programs=programs)
    gather_experts_reference(sources, destinations, fill_experts, fill_slots, fill_count)


# Tensors on both devices come here too: the dispatcher prefers CUDA.
def _cuda(
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    fill_experts: Tensor,
    fill_slots: Tensor,
    fill_count: Tensor,
    *,
    programs: int = DEFAULT_PROGRAMS,
) -> None:
    require_triton(_NAME)
    from specmoe_compile.kernels.gather_experts.kernel import launch_gather

    _check(sources, destinations, fill_experts, fill_slots, fill_count, programs=programs)
    for bank, source in enumerate(sources):
        # A fault of the device could not be reported as one sentence, and would end its context.
        if source.device.type == "cpu" and not source.is_pinned():
            raise ValueError(
                f"specmoe_kernels::{_NAME}: sources[{bank}] is host memory that the device cannot"
                " read, expected pinned memory; call .pin_memory() or register it with"
                " cudaHostRegister"
            )
    with torch.cuda.device(destinations[0].device):
        launch_gather(
            sources, destinations, fill_experts, fill_slots, fill_count, programs=programs
        )


implement(_NAME, cpu=_cpu, cuda=_cuda, fake=_check)
