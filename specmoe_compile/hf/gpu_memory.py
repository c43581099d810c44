"""What did not fit when a generation runs out of memory, in one sentence with numbers."""

from __future__ import annotations

import contextlib
import gc
import re
import traceback
from collections.abc import Iterator

import torch

from specmoe_compile.errors import SpecMoEError
from specmoe_compile.runtime.session import Session
from specmoe_compile.system.out_of_memory import out_of_memory_or_none
from specmoe_compile.system.sizes import format_bytes


@contextlib.contextmanager
def naming_what_did_not_fit(session: Session) -> Iterator[None]:
    """Raise a `SpecMoEError` for memory that a forward call or a generation asks for in vain.

    The experts lie in their cache already, so what asks is the cache of keys and values, the
    activations of a step, or the memory of its CUDA graph. What the failed call holds is let go,
    also where the caller keeps the error: a graph cannot be recorded beside tensors in its memory.

    Args:
        session: of the model that runs.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        cause = None if isinstance(error, SpecMoEError) else out_of_memory_or_none(error)
        if cause is None:
            raise
        said = _sentence(session, str(cause))
        _let_go(error)
        raise SpecMoEError(said) from error


def _let_go(error: BaseException) -> None:
    """Forget the local variables of all calls that an error, and those before it, ended."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        found = todo.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        traceback.clear_frames(found.__traceback__)
        todo += [found.__cause__, found.__context__]
    gc.collect()


def _sentence(session: Session, said: str) -> str:
    told, where = [_wanted(said)], "memory"
    if session.device.type == "cuda":
        where = "the GPU's memory"
        free, total = torch.cuda.mem_get_info(session.device)
        told.append(f"{format_bytes(free)} of the GPU's {format_bytes(total)} are free")
    told.append(f"the expert cache takes {format_bytes(session.stats.fast_tier_bytes)}")
    return (
        f"Keys and values, activations or a CUDA graph do not fit {where}: {', '.join(told)}."
        " Load the model with a smaller expert_cache, or give a shorter prompt, fewer"
        " max_new_tokens or fewer sequences at once."
    )


def _wanted(said: str) -> str:
    on_gpu = re.search(r"Tried to allocate ([\d.]+ \w+)", said)
    if on_gpu:
        return f"{on_gpu[1]} were asked for"
    on_cpu = re.search(r"tried to allocate (\d+) bytes", said)
    if on_cpu:
        return f"{format_bytes(int(on_cpu[1]))} were asked for"
    return "the allocator could not give more"
