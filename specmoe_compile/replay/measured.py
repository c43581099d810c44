"""What a trace says about the machine that it was recorded on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from specmoe_compile.replay.trace import RoutingTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Means and rates of the steps that count; None where the trace has nothing to tell.

    Means and not medians, since these add up: a step takes its computing and its waits.

    Attributes:
        link_gbps: bytes read over the time in which reads were in progress, 1e9 bytes per second.
        compute_ms: time of a step outside of waits for reads.
        tpot_ms: time of a step.
        fetched_per_step: experts that a step reads.
    """

    link_gbps: float | None
    compute_ms: float | None
    tpot_ms: float | None
    fetched_per_step: float


def measured(trace: RoutingTrace, steps: Sequence[int]) -> Measured:
    """Read off what was measured in some steps of a trace.

    Args:
        trace: whose last step has no time of its own.
        steps: those that count.
    """
    tensors = trace.tensors
    stalls: list[float] = tensors["stall_ms"].tolist()
    times: list[float] = tensors["step_ms"].tolist()
    timed = timed_steps(trace, steps)
    read_ms = sum(tensors["read_ms"][timed].tolist())
    read_bytes = sum(tensors["read_bytes"][timed].tolist())
    return Measured(
        link_gbps=read_bytes / 1e6 / read_ms if read_ms > 0 and read_bytes else None,
        compute_ms=fmean(max(0.0, times[s] - stalls[s]) for s in timed) if timed else None,
        tpot_ms=fmean(times[s] for s in timed) if timed else None,
        fetched_per_step=read_bytes / fmean(trace.record_bytes) / max(1, len(timed)),
    )


def timed_steps(trace: RoutingTrace, steps: Sequence[int]) -> list[int]:
    """Return those steps that another decode step follows: what a last one's time holds is unknown.

    Steps that took more than three times the median are left out too: something else ran.
    """
    times: list[float] = trace.tensors["step_ms"].tolist()
    decode = set(trace.decode_steps())
    followed = [step for step in steps if step + 1 in decode and times[step] > 0]
    if not followed:
        return []
    max_ms = 3 * median(times[step] for step in followed)
    return [step for step in followed if times[step] <= max_ms]
