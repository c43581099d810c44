"""Compiles the C++ engine and its ops where they are not there yet: python -m ...native.

For an editable install, which carries no engine; else the first model would wait for it. Without a
compiler there is a warning, and PyTorch computes.
"""

from __future__ import annotations

from specmoe_compile.runtime.cpu.native.library import library_or_none
from specmoe_compile.runtime.cpu.native.torch_ops import use_native_steps


def main() -> None:
    """Compile, or find what was compiled."""
    library = library_or_none()
    if library is not None:
        use_native_steps(library)


if __name__ == "__main__":
    main()
