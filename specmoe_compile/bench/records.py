"""The records that `specmoe bench --json` writes, schema 1.

One `ArmRun` is what one process measured; an arm's record puts its repeats together. Keys that the
schema names are always there; a value that an arm cannot have is null.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmJob:
    """What one worker process is asked to measure.

    Attributes:
        arm: name in `arms.ARMS`.
        model: checkpoint folder or hub name.
        prompts: token ids, one list per prompt; each is generated on its own (batch 1).
        new_tokens: tokens to generate per prompt, greedy.
        warmup_tokens: tokens generated once before anything is timed, from the first prompt.
        skip_tokens: tokens after the first one of each prompt that are left out of `tpot_ms`.
        device, dtype, quantize, store, expert_cache, store_dir, missing_weights: as for
            `specmoe_compile.from_pretrained`.
        kv_cache: "static" or "dynamic", for compiled arms; other arms run as they come.
        options: of `torch.compile(backend="specmoe")`, over those of the arm.
        threads: that compute; None leaves the engine's default.
        group: name under which the ranks of a split model meet; None in one process.
        peer_file: file that `peer_files` made for this arm; None where there is none yet.
        work_dir: folder for what an arm writes meanwhile (accelerate's offload folder).
        save_logits: file for the logits of every step, [prompts, new_tokens, V] float32, or None.
        started_s: wall clock at which the parent started the process, set by the harness.
    """

    arm: str
    model: str
    prompts: list[list[int]]
    new_tokens: int
    warmup_tokens: int = 8
    skip_tokens: int = 4
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    store: str | None = None
    expert_cache: str = "25%"
    store_dir: str | None = None
    missing_weights: str = "error"
    kv_cache: str = "static"
    options: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None
    group: str | None = None
    peer_file: str | None = None
    work_dir: str
    save_logits: str | None = None
    started_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRun:
    """What one worker process measured.

    Attributes:
        policy: specmoe's policy, or None for an arm without specmoe.
        tpot_samples_ms: times between tokens, warm-up and skipped tokens left out.
        ttft_samples_ms: from the call of `generate` to its first token, per prompt.
        tokens: generated ids, per prompt.
        decode, prefill: the session's counters (`counters.Counters`) from each first token on, and
            up to it; None for an arm without a session.
        decode_read_bytes: what the kernel read from block devices for this process while decoding,
            from each first token on; None where it does not say.
        fast_tier_bytes: expert bytes that the arm keeps in the fast tier; None where the operating
            system decides, by its page cache.
        load_s: loading the model. compile_s: time that Dynamo and Inductor took.
        passes_ms: time of specmoe's passes in it; 0 where compiled code came from a cache.
        first_token_s: from the start of the process to the first token, imports and all.
        peak_rss_bytes: VmHWM of the process; children are not in it.
        load_peak_rss_bytes: the same, read when the model was loaded.
        children_peak_rss_bytes: largest child (compiler processes).
        peak_cuda_bytes: `torch.cuda.max_memory_allocated()`, None without CUDA.
        compiled_graphs: unique graphs that Dynamo compiled; None for an arm that is not compiled.
        threads: of PyTorch.
        notes: what a reader must know about how the arm ran.
    """

    arm: str
    policy: str | None
    tpot_samples_ms: list[float]
    ttft_samples_ms: list[float]
    tokens: list[list[int]]
    decode: dict[str, Any] | None
    prefill: dict[str, Any] | None
    decode_read_bytes: int | None = None
    fast_tier_bytes: int | None
    load_s: float
    compile_s: float
    passes_ms: float = 0.0
    first_token_s: float
    peak_rss_bytes: int
    load_peak_rss_bytes: int
    children_peak_rss_bytes: int
    peak_cuda_bytes: int | None
    compiled_graphs: int | None
    threads: int
    notes: list[str]


def tokens_sha256(tokens: Sequence[Sequence[int]]) -> str:
    """Hash of generated ids: per prompt its length, then its ids, all little-endian int64."""
    digest = hashlib.sha256()
    for row in tokens:
        digest.update(struct.pack(f"<{len(row) + 1}q", len(row), *row))
    return digest.hexdigest()


def spread(samples: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 of samples, in their unit; between neighbours where they fall there.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("no samples: nothing was timed")
    return {f"p{p}": round(float(np.percentile(samples, p)), 4) for p in (20, 50, 80)}


def arm_record(
    name: str,
    runs: Sequence[ArmRun],
    *,
    memory_cap_bytes: int | None,
    cgroup_peaks_bytes: Sequence[int | None] = (),
) -> dict[str, Any]:
    """Put the repeats of one arm together, in the form of schema 1.

    Args:
        name: the arm's.
        runs: its repeats, at least one.
        memory_cap_bytes: cap that really held, or None.
        cgroup_peaks_bytes: peak use that the kernel charged to each run, where it was capped.
    """
    first = runs[0]
    hashes = sorted({tokens_sha256(run.tokens) for run in runs})
    decode = [run.decode for run in runs if run.decode is not None]
    prefill = [run.prefill for run in runs if run.prefill is not None]
    peaks = [peak for peak in cgroup_peaks_bytes if peak is not None]
    return {
        "name": name,
        "policy": first.policy,
        "tpot_ms": spread([ms for run in runs for ms in run.tpot_samples_ms]),
        "ttft_ms": round(median([ms for run in runs for ms in run.ttft_samples_ms]), 4),
        "tokens_sha256": hashes[0] if len(hashes) == 1 else None,
        "hit_rate": _hit_rate_or_none(decode),
        "demand_bytes": _total_or_none(decode, "demand_bytes"),
        "speculative_bytes": _total_or_none(decode, "speculative_bytes"),
        "stall_ms": _total_or_none(decode, "stall_ms"),
        "peak_rss_bytes": max(run.peak_rss_bytes for run in runs),
        "fast_tier_bytes": first.fast_tier_bytes,
        "memory_cap_bytes": memory_cap_bytes,
        # Beyond the schema: what one needs to judge the above.
        "repeats": len(runs),
        "samples": sum(len(run.tpot_samples_ms) for run in runs),
        "timed_tokens": sum(len(row) for run in runs for row in run.tokens),
        "decode_read_bytes": _sum_or_none([run.decode_read_bytes for run in runs]),
        "decode_steps": _total_or_none(decode, "steps"),
        "misses": _total_or_none(decode, "misses"),
        "read_busy_ms": sum(c["read_busy_ms"] for c in decode) if decode else None,
        "read_gbps": _read_gbps_or_none(decode),
        "prefill_demand_bytes": _total_or_none(prefill, "demand_bytes"),
        "prefill_stall_ms": _total_or_none(prefill, "stall_ms"),
        "load_peak_rss_bytes": max(run.load_peak_rss_bytes for run in runs),
        "children_peak_rss_bytes": max(run.children_peak_rss_bytes for run in runs),
        "cgroup_peak_bytes": max(peaks) if peaks else None,
        "peak_cuda_bytes": first.peak_cuda_bytes,
        "compiled_graphs": first.compiled_graphs,
        "threads": first.threads,
        "notes": first.notes,
        "tokens": first.tokens,
        "runs": [_run_summary(run) for run in runs],
    }


def _run_summary(run: ArmRun) -> dict[str, Any]:
    keep = asdict(run)
    for name in ("arm", "policy", "tokens", "notes", "threads"):
        del keep[name]
    keep["tokens_sha256"] = tokens_sha256(run.tokens)
    for name in ("tpot_samples_ms", "ttft_samples_ms"):
        keep[name] = [round(ms, 4) for ms in keep[name]]
    return keep


def _total_or_none(counters: Sequence[dict[str, Any]], name: str) -> Any:
    """Sum of a counter over the repeats, None for an arm without a session."""
    return sum(c["total"][name] for c in counters) if counters else None


def _sum_or_none(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _hit_rate_or_none(counters: Sequence[dict[str, Any]]) -> float | None:
    if not counters:
        return None
    hits, misses = _total_or_none(counters, "hits"), _total_or_none(counters, "misses")
    return hits / (hits + misses) if hits + misses else None


def _read_gbps_or_none(counters: Sequence[dict[str, Any]]) -> float | None:
    """Bytes read over the time in which reads were in progress, 1e9 bytes per second."""
    busy_ms = sum(c["read_busy_ms"] for c in counters)
    if not busy_ms:
        return None
    read_bytes = sum(c["total"]["demand_bytes"] + c["total"]["speculative_bytes"] for c in counters)
    return float(read_bytes / 1e6 / busy_ms)
