"""Run-time half of the options of speculation.

Shape letters: T tokens, K top-k, L MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from specmoe_compile.config import CompileOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    """What a session does with predictions; see the fields of `CompileOptions`."""

    policy: Literal["exact", "default_vector", "commit"] = "exact"
    """what a miss gets."""
    default_vector_threshold: float = 0.1
    """router weight (0..1) below which a miss gets its default vector."""
    commit_weights: Literal["predicted", "true"] = "predicted"
    """router weights of policy `commit`."""
    prefetch_width: int | None = None
    """experts prefetched per token, at most as many as are predicted; None: all of them."""
    prefetch_budget_bytes: int | None = None
    """most speculative bytes per prefetch of a layer; None: no limit."""
    auto_off: bool = True
    """turn a layer's prefetch off while it does not pay."""
    skip_layers: tuple[int, ...] = ()
    """MoE layers that never speculate."""
    lookahead: int = 1
    """MoE layers between a prediction and its use."""
    nvtx: bool = False
    """annotate phases with NVTX ranges."""

    @classmethod
    def from_options(cls, options: CompileOptions) -> SpeculationConfig:
        """Take the run-time fields of a compile's options; `skip_layers="auto"` skips none here."""
        skip = options.skip_layers if isinstance(options.skip_layers, tuple) else ()
        return cls(
            policy=options.policy,
            default_vector_threshold=options.default_vector_threshold,
            commit_weights=options.commit_weights,
            prefetch_width=options.prefetch_width,
            prefetch_budget_bytes=options.prefetch_budget_bytes,
            auto_off=options.auto_off,
            skip_layers=skip,
            lookahead=options.lookahead,
            nvtx=options.nvtx,
        )
