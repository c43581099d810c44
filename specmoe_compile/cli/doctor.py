"""`specmoe doctor`: what this machine can do, and what to install."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from specmoe_compile.cli.options import DEBUG, JSON

READER_THREADS = 4
"""What the runtime reads with unless it is told otherwise; the figure to compare with."""

_THREADS = (1, READER_THREADS, 8)
_MEMORY_PROBE_BYTES = 256 << 20
_LINK_PROBE_BYTES = 256 << 20
_DISK_MARGIN_BYTES = 64 << 20


def doctor(
    record_mib: Annotated[
        float,
        typer.Option(min=0.004, max=65536, help="Size of one expert, as it is read or moved."),
    ] = 3.0,
    store_dir: Annotated[
        Path | None,
        typer.Option(
            help="Expert store to read, or a folder on the disk to measure, where a temporary file"
            " is written. By default where stores go.",
            show_default=False,
        ),
    ] = None,
    file_mib: Annotated[
        int, typer.Option(min=64, help="Size of the temporary file that is read.")
    ] = 512,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for each disk measurement.")] = 2.0,
    json: JSON = None,
    debug: DEBUG = False,
) -> None:
    """Say what this machine can do, and what to install for more.

    Measures the disk with parallel O_DIRECT reads of one expert's size, memory with a plain read
    and with a matrix-vector product, and the link to a GPU by record size. Their ratio says how
    much an expert cache is worth.

    [bold]Examples[/bold]

      specmoe doctor

      specmoe doctor --store-dir /data --record-mib 9 --json doctor.json
    """
    from specmoe_compile.runtime.experts.layout import RECORD_ALIGNMENT, align_up
    from specmoe_compile.system.machine import cache_folder
    from specmoe_compile.system.output import check_writable, write_json

    check_writable(json)
    folder = cache_folder() if store_dir is None else store_dir.expanduser()
    if store_dir is None:
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        raise FileNotFoundError(f"--store-dir {folder} is not a folder: create it first.")
    record_bytes = align_up(int(record_mib * (1 << 20)), RECORD_ALIGNMENT)
    result = examine(folder, record_bytes, file_mib << 20, seconds)
    _print(result)
    if json is not None:
        write_json(json, result)


def examine(folder: Path, record_bytes: int, file_bytes: int, seconds: float) -> dict[str, Any]:
    """Measure the machine.

    Args:
        folder: an expert store, or a folder on the disk to measure.
        record_bytes: size of a read, a multiple of 4096.
        file_bytes: size of the temporary file, where one is written.
        seconds: for each disk measurement.

    Raises:
        OSError: the folder is not writable, or the disk is full.
    """
    from rich.console import Console

    from specmoe_compile.bench import probes
    from specmoe_compile.bench.machine import provenance
    from specmoe_compile.bench.memory_cap import why_not_permitted
    from specmoe_compile.system.compilers import find_compiler_or_none, python_headers_found
    from specmoe_compile.system.machine import available_ram_bytes
    from specmoe_compile.system.memory_groups import own_memory_groups

    free_disk = _check_space(folder, record_bytes, file_bytes)
    with Console(stderr=True).status("Looking at the machine ...") as status:

        def say(what: str) -> None:
            status.update(f"Disk: {what} ...")

        disk = probes.disk_rates(
            folder,
            record_bytes=record_bytes,
            threads=_THREADS,
            file_bytes=file_bytes,
            seconds=seconds,
            on_step=say,
        )
        status.update("Memory ...")
        size = min(_MEMORY_PROBE_BYTES, available_ram_bytes() // 4)
        memory = {
            "read_gbps": probes.memory_read_gbps(size),
            "gemv_bfloat16_gbps": probes.gemv_gbps(size, "bfloat16"),
            "gemv_float32_gbps": probes.gemv_gbps(size, "float32"),
        }
        origin = provenance()
        can_gather = origin["machine"]["gpu"] and origin["versions"]["triton"]
        status.update("Link to the GPU ...")
        link = _link_rates(record_bytes) if can_gather else None
    groups = own_memory_groups()
    result: dict[str, Any] = {
        "schema": 1,
        **origin,
        "disk": {**asdict(disk), "gbps": {str(n): rate for n, rate in disk.gbps.items()}},
        "reader_threads": READER_THREADS,
        "memory": memory,
        "link": link,
        "free_ram_bytes": available_ram_bytes(),
        "free_disk_bytes": free_disk,
        "cgroup_version": groups[0].version if groups else None,
        "memory_cap": why_not_permitted() or "permitted",
        "compiler": find_compiler_or_none(),
        "python_headers": python_headers_found(),
    }
    result["store"] = _store_or_none(folder, disk.gbps[READER_THREADS])
    result["advice"] = advice(result)
    return result


def _link_rates(record_bytes: int) -> dict[str, Any]:
    """Bandwidths to the GPU, in records of this size and of others, as JSON."""
    from specmoe_compile.bench.link_rates import RECORD_BYTES, measure_link

    sizes = (*RECORD_BYTES, record_bytes)
    return asdict(measure_link(sizes, moved_bytes=max(_LINK_PROBE_BYTES, record_bytes)))


def _check_space(folder: Path, record_bytes: int, file_bytes: int) -> int:
    """Free bytes of a folder's disk; raises `OSError` where the measurement's file does not fit."""
    from specmoe_compile.bench import probes

    free_bytes = shutil.disk_usage(folder).free
    needed = max(file_bytes, record_bytes * max(_THREADS)) + _DISK_MARGIN_BYTES
    if free_bytes < needed and not probes.is_store(folder, record_bytes, _THREADS):
        raise OSError(
            f"{folder} has {free_bytes >> 20} MiB free, and the disk measurement needs"
            f" {needed >> 20} MiB: choose another --store-dir, or a smaller --file-mib."
        )
    return free_bytes


def _store_or_none(folder: Path, gbps: float) -> dict[str, Any] | None:
    """What a store in the folder holds and what a fetch from it costs; None where there is none."""
    from specmoe_compile.runtime.store.header import HEADER_NAME, read_header

    if not (folder / HEADER_NAME).is_file():
        return None
    layers = read_header(folder).layers
    records = sum(layer.num_experts for layer in layers)
    record_bytes = sum(layer.total_bytes for layer in layers) // records
    return {
        "experts": " and ".join(dict.fromkeys(layer.layout.numbers for layer in layers)),
        "records": records,
        "record_bytes": record_bytes,
        "fetch_ms": record_bytes / 1e6 / gbps if gbps else None,
    }


def advice(result: dict[str, Any]) -> list[str]:
    """What to install or change, most urgent first; empty if nothing is missing."""
    lines: list[str] = []
    if result["compiler"] is None:
        lines.append(
            "Install a C++ compiler (Debian, Ubuntu: apt install g++): without one Inductor cannot"
            ' compile for the CPU; lowering="eager" works.'
        )
    elif not result["python_headers"]:
        lines.append(
            "Install Python's headers (Debian, Ubuntu: apt install python3-dev): Inductor's C++"
            " code includes Python.h."
        )
    if result["machine"]["gpu"] is None:
        lines.append(
            "PyTorch sees no CUDA device: models run on the CPU, with experts in RAM or on disk."
        )
    elif result["versions"]["triton"] is None:
        lines.append("Install triton 3.6 or newer: the CUDA kernels need it.")
    if result["versions"]["accelerate"] is None:
        lines.append("Install accelerate for the bench arms accelerate and accelerate_auto.")
    if not result["disk"]["direct"]:
        lines.append(
            "The store's file system refuses O_DIRECT: reads go through the page cache and cost one"
            " more copy; a --store-dir on ext4 or xfs avoids it."
        )
    if result["memory_cap"] != "permitted":
        lines.append(f"specmoe bench --memory-cap will not hold: {result['memory_cap']}.")
    return lines


def _link_rows(link: dict[str, Any] | None, has_gpu: bool) -> list[tuple[str, str]]:
    from specmoe_compile.system.sizes import format_bytes

    if link is None:
        why_not = "Triton is missing" if has_gpu else "no CUDA device"
        return [("Host to GPU", f"not measured: {why_not}")]
    large = f"{link['large_copy_gbps']:.1f} GB/s, one copy of {format_bytes(link['large_bytes'])}"
    rows = [("Host to GPU, at most", large)]
    for rate in link["by_record"]:
        by_engine = f"{rate['copy_gbps']:.1f} GB/s by the copy engine"
        by_gpu = f"{rate['gather_gbps']:.1f} read by the GPU itself (gather, in a CUDA graph)"
        rows.append(
            (f"in records of {format_bytes(rate['record_bytes'])}", f"{by_engine}, {by_gpu}")
        )
    return rows


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from specmoe_compile.system.sizes import format_bytes

    machine, disk, memory = result["machine"], result["disk"], result["memory"]
    gpu = machine["gpu"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows: list[tuple[str, str]] = [
        ("Processor", f"{machine['cpu']}, {machine['cores']} cores"),
        ("System", machine["system"]),
        ("Free RAM", format_bytes(result["free_ram_bytes"])),
        ("Free disk", format_bytes(result["free_disk_bytes"])),
        ("GPU", "none" if gpu is None else f"{gpu['name']}, {format_bytes(gpu['memory_bytes'])}"),
        ("Versions", ", ".join(f"{n} {v or 'missing'}" for n, v in result["versions"].items())),
        ("C++ compiler", result["compiler"] or "none"),
        ("Python headers", "found" if result["python_headers"] else "missing"),
        ("O_DIRECT", "yes" if disk["direct"] else "refused"),
        ("Memory caps", f"cgroup {result['cgroup_version']}, {result['memory_cap']}"),
    ]
    size = format_bytes(disk["record_bytes"])
    for threads, rate in disk["gbps"].items():
        mark = " (what the runtime uses)" if threads == str(READER_THREADS) else ""
        what = f"{rate:.2f} GB/s in records of {size} of a {disk['source']}{mark}"
        readers = "1 reader" if threads == "1" else f"{threads} readers"
        rows.append((f"Disk, {readers}", what))
    store = result["store"]
    if store is not None:
        cost = "" if store["fetch_ms"] is None else f", a fetch costs {store['fetch_ms']:.2f} ms"
        what = f"{store['experts']}, {store['records']} of {format_bytes(store['record_bytes'])}"
        rows.append(("Experts in the store", what + cost))
    rows += [
        ("Memory, read", f"{memory['read_gbps']:.1f} GB/s"),
        ("Memory, bf16 GEMV", f"{memory['gemv_bfloat16_gbps']:.1f} GB/s of weights"),
        ("Memory, fp32 GEMV", f"{memory['gemv_float32_gbps']:.1f} GB/s of weights"),
    ]
    rows += _link_rows(result["link"], gpu is not None)
    for name, text in rows:
        table.add_row(f"[bold]{name}[/bold]", text)
    console = Console()
    console.print(table)
    for line in result["advice"]:
        console.print(f"• {line}", soft_wrap=sys.stdout.isatty() is False)
    if not result["advice"]:
        console.print("Nothing is missing.")
