"""specmoe: run Mixture-of-Experts models whose experts do not fit the fast memory."""

from __future__ import annotations

__version__ = "0.1.0"
