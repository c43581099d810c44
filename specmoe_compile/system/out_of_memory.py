"""What says that memory ran out: PyTorch has one class for it, and many plain errors beside it."""

from __future__ import annotations

from specmoe_compile.errors import SpecMoEError

_SAYINGS = (
    "can't allocate memory",  # the CPU's allocator
    "out of memory",  # a GPU's allocator, CUDA when it makes a graph, Triton
    "Storage size calculation overflowed",
    "_STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN, for their workspaces
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, PyTorch or a library below it means that memory ran out.

    Not our own errors, which say what did not fit already.
    """
    if isinstance(error, SpecMoEError) or not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    return any(text in str(error) for text in _SAYINGS)


def out_of_memory_or_none(error: BaseException) -> BaseException | None:
    """The error itself, or one during whose handling it was raised, that says memory ran out.

    A CUDA graph whose recording is broken off may end in an error of its own.
    """
    seen: BaseException | None = error
    while seen is not None and not is_out_of_memory(seen):
        seen = seen.__cause__ or seen.__context__
    return seen
