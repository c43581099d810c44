"""What a session did: hits, misses, bytes, stalls and speculation, per MoE layer.

Counters are plain integers on the host, added to once per layer step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from specmoe_compile.system.sizes import format_bytes


@dataclass(slots=True)
class LayerStats:
    """Counters of one MoE layer. An expert that several tokens of a step use counts once."""

    steps: int = 0
    """times the layer ran."""
    native_steps: int = 0
    """of them those that ran in C++, without Python. On a CPU."""
    hits: int = 0
    """experts that were in the fast tier, or on their way there by a prefetch."""
    misses: int = 0
    """experts that had to be fetched on demand."""
    demand_bytes: int = 0
    """read because an expert was needed."""
    filled_bytes: int = 0
    """copied once, before the first step, where every expert has a slot. On a GPU."""
    speculative_bytes: int = 0
    """read because an expert was predicted."""
    useful_speculative_bytes: int = 0
    """the part that was needed before it lost its slot."""
    wasted_speculative_bytes: int = 0
    """the part that was read and then evicted, dropped or found wrong before any use."""
    pushed_out_bytes: int = 0
    """read, on demand or ahead, because a useless guess had pushed the expert out of the cache. Not
    counted on a GPU, nor without `auto_off`."""
    stall_ms: float = 0.0
    """time in which the caller had nothing to compute and waited for reads."""
    stall_bytes: int = 0
    """the part of the bytes awaited that came in that time: of each read the share of its own time
    that the caller waited. Not counted on a GPU."""
    predicted: int = 0
    """experts predicted, in steps where a prediction met a true routing."""
    needed: int = 0
    """experts that the true router wanted in those steps."""
    recalled: int = 0
    """experts that were both predicted and wanted."""
    prefetches: int = 0
    """speculative reads issued."""
    late_prefetches: int = 0
    """speculative reads that the caller still had to wait for."""
    cancelled_prefetches: int = 0
    """speculative reads taken back before they started."""
    skipped_experts: int = 0
    """misses that got a default vector (policy default_vector), or nothing (commit)."""

    @property
    def hit_rate(self) -> float:
        """Hits over hits and misses; 0 before the first step."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def lacked_bytes(self) -> int:
        """What was needed and had to be fetched, on demand or ahead."""
        return self.demand_bytes + self.useful_speculative_bytes

    @property
    def recall(self) -> float:
        """Share of the wanted experts that were predicted; 0 before the first prediction."""
        return self.recalled / max(1, self.needed)

    def copy(self) -> LayerStats:
        """Return a snapshot."""
        return replace(self)

    def reset(self) -> None:
        """Set every counter to zero, in place."""
        for item in fields(self):
            setattr(self, item.name, item.default)

    def add(self, other: LayerStats) -> None:
        """Add another layer's counters to these."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))

    def as_dict(self) -> dict[str, Any]:
        """Counters and ratios by name."""
        return {**asdict(self), "hit_rate": self.hit_rate, "recall": self.recall}


@dataclass(slots=True)
class GenerationStats:
    """How `generate` launched its steps, and read its tokens.

    Attributes:
        tokens: steps whose token was used, batches counted once.
        ahead: those whose next step was launched before their token was read.
        dropped: steps that were launched in vain, behind the last token.
        reason: why the last call took transformers' own loop, or waited for each token; None
            where it ran ahead, and on the CPU, where there is nothing to wait for.
    """

    tokens: int = 0
    ahead: int = 0
    dropped: int = 0
    reason: str | None = None


@dataclass(slots=True)
class Stats:
    """A snapshot of a session's counters.

    Attributes:
        layers: per MoE layer, in order.
        total: their sum.
        fast_tier_bytes: memory reserved for experts in the fast tier (slots and staging).
        store_bytes: bytes of all experts in the slow tier.
        store: "disk" or "ram".
        read_busy_ms: wall time in which at least one read was in progress.
        generation: how `generate` launched its steps.
        eviction: what decides who leaves each layer's cache, in words; empty without a cache.
        experts: what experts' weights are in their records, such as "MXFP4" or "bfloat16".
        record_bytes: of one expert, padding included; the mean where layers differ.
    """

    layers: tuple[LayerStats, ...]
    fast_tier_bytes: int
    store_bytes: int
    store: str
    read_busy_ms: float
    generation: GenerationStats = field(default_factory=GenerationStats)
    eviction: tuple[str, ...] = ()
    experts: str = ""
    record_bytes: int = 0
    total: LayerStats = field(init=False)

    def __post_init__(self) -> None:
        self.total = LayerStats()
        for layer in self.layers:
            self.total.add(layer)

    @classmethod
    def over_ranks(cls, ranks: Sequence[Stats]) -> Stats:
        """The counters, bytes and times of several processes added up; all else is the first's.

        Times add up too: `read_gbps` is the mean rate of one rank's reads.
        """
        first = ranks[0]
        layers = tuple(layer.copy() for layer in first.layers)
        for other in ranks[1:]:
            for layer, more in zip(layers, other.layers, strict=True):
                layer.add(more)
        return replace(
            first,
            layers=layers,
            fast_tier_bytes=sum(one.fast_tier_bytes for one in ranks),
            store_bytes=sum(one.store_bytes for one in ranks),
            read_busy_ms=sum(one.read_busy_ms for one in ranks),
        )

    @property
    def overlap(self) -> float:
        """Share of the reading time in which the caller did something else; 0 without reads."""
        if self.read_busy_ms <= 0.0:
            return 0.0
        return max(0.0, 1.0 - self.total.stall_ms / self.read_busy_ms)

    @property
    def read_gbps(self) -> float:
        """Bytes read over the time in which reads were in progress, in 1e9 bytes per second."""
        read_bytes = self.total.demand_bytes + self.total.speculative_bytes
        return read_bytes / 1e6 / self.read_busy_ms if self.read_busy_ms > 0.0 else 0.0

    @property
    def fetch_ms(self) -> float:
        """Time of one record at the rate of the reads so far; 0 without reads."""
        return self.record_bytes / 1e6 / self.read_gbps if self.read_gbps > 0.0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, for JSON: totals at the top, `layers` as a list."""
        return {
            **self.total.as_dict(),
            "fast_tier_bytes": self.fast_tier_bytes,
            "store_bytes": self.store_bytes,
            "store": self.store,
            "experts": self.experts,
            "record_bytes": self.record_bytes,
            "fetch_ms": self.fetch_ms,
            "read_busy_ms": self.read_busy_ms,
            "read_gbps": self.read_gbps,
            "overlap": self.overlap,
            "eviction": list(self.eviction),
            "generation": asdict(self.generation),
            "layers": [layer.as_dict() for layer in self.layers],
        }

    def _eviction_lines(self) -> list[str]:
        names = Counter(self.eviction).most_common()
        return [f"eviction: {', '.join(f'{name} ({n} layers)' for name, n in names)}"] * bool(names)

    def __str__(self) -> str:
        head = ("layer", "hits", "misses", "hit %", "demand", "specul.", "useful %", "recall %")
        rows: list[tuple[str, ...]] = [(*head, "late", "stall ms")]
        for index, layer in enumerate(self.layers):
            rows.append(_row(str(index), layer))
        rows.append(_row("total", self.total))
        return "\n".join(
            (
                _table(rows),
                f"store: {self.store}, {_mib(self.store_bytes)}; fast tier:"
                f" {_mib(self.fast_tier_bytes)}; read at {self.read_gbps:.2f} GB/s,"
                f" {100 * self.overlap:.0f} % of it overlapped",
                *self._eviction_lines(),
                *self._experts_line(),
                *self._engine_line(),
            )
        )

    def _engine_line(self) -> tuple[str, ...]:
        if not self.total.native_steps:
            return ()
        return (f"layer steps: {self.total.native_steps} of {self.total.steps} in C++",)

    def _experts_line(self) -> tuple[str, ...]:
        if not self.experts:
            return ()
        cost = f"; a fetch costs {self.fetch_ms:.2f} ms" if self.fetch_ms else ""
        return (f"experts: {self.experts}, {format_bytes(self.record_bytes)} each{cost}",)


def _row(name: str, layer: LayerStats) -> tuple[str, ...]:
    useful = layer.useful_speculative_bytes / max(1, layer.speculative_bytes)
    return (
        name,
        str(layer.hits),
        str(layer.misses),
        f"{100 * layer.hit_rate:.1f}",
        _mib(layer.demand_bytes),
        _mib(layer.speculative_bytes),
        f"{100 * useful:.1f}" if layer.speculative_bytes else "-",
        f"{100 * layer.recall:.1f}" if layer.needed else "-",
        str(layer.late_prefetches),
        f"{layer.stall_ms:.1f}",
    )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f} MiB"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of cells in right-aligned columns under a ruled head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join((lines[0], "-" * len(lines[0]), *lines[1:]))
