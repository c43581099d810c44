"""Drawing without a screen."""

from __future__ import annotations

from typing import Any


def load_pyplot() -> Any:
    """`matplotlib.pyplot`, drawing to files.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "The plots need matplotlib: pip install 'specmoe-compile[bench]'."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
