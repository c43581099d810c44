"""What a profiler sees of decode steps: host synchronisation, copying, and one layer's time line.

Ranges such as `specmoe/L12/prefetch` (the session's NVTX ranges) are recorded as annotations of the
trace. The trace that is kept holds the device's work, the ranges and the synchronisations only, in
Chrome's format, compressed.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.kit.plots import load_pyplot

SYNCHRONISATIONS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaStreamWaitValue32",
)
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_RANGES = ("user_annotation", "gpu_user_annotation")
_STEP = "decode_step"
_PLAN = "plan_cache"

Event = dict[str, Any]


def profile_steps(
    step: Callable[[], None], count: int, *, device: torch.device, trace_file: Path | None = None
) -> dict[str, Any]:
    """Run `count` steps under the profiler.

    Args:
        step: runs one.
        count: how many.
        device: where they run.
        trace_file: where to keep the reduced trace (`.json.gz`); None keeps none.

    Returns:
        Synchronisations, copies to the host and graph launches per step, and on a GPU the share of
        the steps' time in which experts were being copied; None where the device has no such thing.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for index in range(count):
            with record_function(f"{_STEP}_{index}"):
                step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(whole))
        events = reduced_events(json.loads(whole.read_text(encoding="utf-8"))["traceEvents"])
    if trace_file is not None:
        with gzip.open(trace_file, "wt", encoding="utf-8") as file:
            json.dump({"traceEvents": events}, file)
    return summarise(events, count, on_device=device.type == "cuda")


def reduced_events(events: Sequence[Event]) -> list[Event]:
    """Device work, ranges, and the runtime calls that synchronise or launch graphs."""
    kept: list[Event] = []
    for event in events:
        kind, name = event.get("cat"), event.get("name", "")
        runtime = kind in ("cuda_runtime", "cuda_driver") and (
            name in SYNCHRONISATIONS or name == "cudaGraphLaunch"
        )
        if event.get("ph") == "X" and (kind in _DEVICE or kind in _RANGES or runtime):
            kept.append(
                {key: event[key] for key in ("ph", "cat", "name", "pid", "tid", "ts", "dur")}
            )
    return kept


def summarise(events: Sequence[Event], steps: int, *, on_device: bool) -> dict[str, Any]:
    """Per-step figures of a reduced trace; see `profile_steps`."""
    host = [e for e in events if e["cat"] == "user_annotation" and e["name"].startswith(_STEP)]
    ranges = len([e for e in events if e["cat"] == "user_annotation"]) - len(host)
    if not on_device:
        return {
            "host_synchronisations": None,
            "copies_to_host": None,
            "graph_launches": None,
            "copying_share": None,
            "ranges": ranges / steps,
        }
    begin, end = min(e["ts"] for e in host), max(e["ts"] + e["dur"] for e in host)
    # What the profiler itself waits for at the end lies behind the last step.
    calls = [e["name"] for e in events if begin <= e["ts"] <= end and "cuda_" in e["cat"]]
    work = [e for e in events if e["cat"] in _DEVICE]
    copies = [e for e in work if is_transfer(e)]
    span = max(e["ts"] + e["dur"] for e in work) - min(e["ts"] for e in work)
    return {
        "host_synchronisations": sum(name in SYNCHRONISATIONS for name in calls) / steps,
        "copies_to_host": sum("DtoH" in e["name"] for e in work) / steps,
        "graph_launches": calls.count("cudaGraphLaunch") / steps,
        "copying_share": covered_us(copies) / span,
        "ranges": ranges / steps,
    }


def is_transfer(event: Event) -> bool:
    """Whether a device event brings experts from host memory."""
    return "gather_experts" in event["name"] or (
        event["cat"] == "gpu_memcpy" and "HtoD" in event["name"]
    )


def covered_us(events: Sequence[Event]) -> float:
    """Time that at least one of the events covers, us."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e["ts"]):
        stop = event["ts"] + event["dur"]
        total += max(0.0, stop - max(end, event["ts"]))
        end = max(end, stop)
    return total


def read_trace(path: Path) -> list[Event]:
    """Events of a reduced trace."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events: list[Event] = json.load(file)["traceEvents"]
    return events


def one_layer(events: Sequence[Event], layers: int, steps: int) -> list[Event]:
    """Events of one layer in the middle of the trace: device work, or ranges where there is none.

    On a device a layer begins with its cache plan: with prefetch there are two plans per layer.
    """
    work = sorted((e for e in events if e["cat"] in _DEVICE), key=lambda e: e["ts"])
    plans = [e["ts"] for e in work if _PLAN in e["name"]]
    if plans:
        per_layer = max(1, round(len(plans) / (layers * steps)))
        middle = len(plans) // 2 // per_layer * per_layer
        begin = plans[middle]
        end = plans[min(middle + per_layer, len(plans) - 1)]
        return [e for e in work if begin <= e["ts"] + e["dur"] and e["ts"] <= end]
    ranges = [e for e in events if e["cat"] == "user_annotation"]
    name = f"specmoe/L{layers // 2}/"
    found = [e for e in ranges if e["name"].startswith(name)]
    return found[-(len(found) // steps) :] if found else []


def draw_layer(events: Sequence[Event], path: Path, title: str) -> None:
    """Draw a time line, a row per stream (or thread), as a PNG.

    Raises:
        ValueError: matplotlib is not installed, or there is nothing to draw.
    """
    pyplot = load_pyplot()
    if not events:
        raise ValueError("The trace holds no event of this layer: nothing to draw.")
    begin = min(e["ts"] for e in events)
    what = "stream" if events[0]["cat"] in _DEVICE else "host thread"
    lanes = sorted({str(e["tid"]) for e in events})
    kinds = sorted({kind_of(e) for e in events})
    colours = dict(zip(kinds, pyplot.colormaps["tab10"].colors, strict=False))
    figure, axes = pyplot.subplots(figsize=(12, 1.2 + 0.6 * len(lanes)))
    for event in events:
        kind = kind_of(event)
        axes.barh(
            lanes.index(str(event["tid"])),
            event["dur"],
            left=event["ts"] - begin,
            color=colours[kind],
            label=kind,
            height=0.7,
        )
    axes.set_yticks(range(len(lanes)), [f"{what} {lane}" for lane in lanes])
    axes.set_xlabel("us")
    axes.set_title(title)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def kind_of(event: Event) -> str:
    """What an event is, in a word."""
    name = event["name"]
    if name.startswith("specmoe/"):
        return str(name.rpartition("/")[2])
    if is_transfer(event):
        return "expert transfer"
    for part, kind in (
        (_PLAN, "cache plan"),
        ("gate_up_kernel", "experts"),
        ("down_kernel", "experts"),
        ("weighted_sum", "default vectors"),
    ):
        if part in name:
            return kind
    return "all else"
