"""What the passes report."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class PassReport:
    """What one pass did.

    Attributes:
        name: verb_object name of the pass.
        matches: places it rewrote (or found).
        skipped: MoE layer ordinal -> why it was passed over.
        elapsed_ms: its time, filled in by the manager.
    """

    name: str
    matches: int = 0
    skipped: dict[int, str] = field(default_factory=dict)
    elapsed_ms: float = 0.0


@dataclass(slots=True)
class PipelineReport:
    """What the passes did to one graph.

    Attributes:
        passes: one report per pass, in order.
        nodes_before, nodes_after: size of the graph.
        elapsed_ms: time of all passes and checks.
        reason: why the graph was left as it is; None when it was rewritten.
    """

    passes: list[PassReport] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    elapsed_ms: float = 0.0
    reason: str | None = None

    @property
    def matches(self) -> dict[str, int]:
        """Places rewritten, by pass."""
        return {report.name: report.matches for report in self.passes}

    @property
    def skipped(self) -> dict[int, str]:
        """MoE layer ordinal -> the first reason that kept it from being predicted."""
        reasons: dict[int, str] = {}
        for report in self.passes:
            for layer, reason in report.skipped.items():
                reasons.setdefault(layer, reason)
        return dict(sorted(reasons.items()))

    def __str__(self) -> str:
        lines = [
            f"{self.nodes_before} -> {self.nodes_after} nodes in {self.elapsed_ms:.1f} ms"
            + (f"; left as it is: {self.reason}" if self.reason else "")
        ]
        for report in self.passes:
            lines.append(f"  {report.name}: {report.matches} in {report.elapsed_ms:.1f} ms")
        for layer, reason in self.skipped.items():
            lines.append(f"  MoE layer {layer} is not predicted: {reason}")
        return "\n".join(lines)
