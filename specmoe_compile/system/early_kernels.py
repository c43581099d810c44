"""C++ kernels are compiled while Inductor still writes the rest of a graph.

Inductor hands a graph's kernels to the C++ compiler when all of its code is written: until then a
second core has nothing to do, and the first nothing afterwards.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)

_CALL = "async_compile.cpp_pybinding("
"""How the code that Inductor writes asks for a C++ kernel."""


@contextlib.contextmanager
def kernels_compiled_early() -> Iterator[None]:
    """Have each C++ kernel compiled from the moment on that Inductor has written it.

    The same call that Inductor's code will make is made ahead: what it begins to compile, in
    Inductor's own threads, Inductor's code finds by the kernel's source. What goes wrong here goes
    wrong there again, and is told there.
    """
    try:
        from torch._inductor.async_compile import AsyncCompile, get_compile_threads
        from torch._inductor.codegen.wrapper import PythonWrapperCodegen

        wrapper: Any = PythonWrapperCodegen
        inductors = wrapper.define_kernel
    except (ImportError, AttributeError) as error:  # a PyTorch that has them elsewhere
        log.debug("Inductor's kernels are not where they were: %s", error)
        yield
        return

    def define_kernel(self: Any, kernel_name: str, kernel_body: str, *args: Any, **kw: Any) -> Any:
        if kernel_body.startswith(_CALL) and get_compile_threads() > 1:
            try:
                eval(kernel_body, {"async_compile": AsyncCompile()})
            except Exception as error:
                log.debug("%s cannot be compiled ahead: %s", kernel_name, error)
        return inductors(self, kernel_name, kernel_body, *args, **kw)

    wrapper.define_kernel = define_kernel
    try:
        yield
    finally:
        wrapper.define_kernel = inductors
