"""`specmoe pack`: write a checkpoint's experts into a store on disk."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from specmoe_compile.cli.options import (
    ADAPTER,
    DEBUG,
    DTYPE,
    JSON,
    MODEL,
    QUANTIZE,
    STORE_DIR,
)


def pack(
    model: MODEL,
    store_dir: STORE_DIR = None,
    dtype: DTYPE = "auto",
    quantize: QUANTIZE = None,
    adapter: ADAPTER = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the store back and compare all checksums.")
    ] = False,
    json: JSON = None,
    debug: DEBUG = False,
) -> None:
    """Write a checkpoint's experts into a store on disk, in bounded memory.

    generate, bench and from_pretrained(store="disk") pack by themselves when there is no store yet;
    pack when you want to choose the time and the disk. A pack that was killed goes on where it was.

    [bold]Examples[/bold]

      specmoe pack Qwen/Qwen3-30B-A3B --store-dir /data/qwen3-store

      specmoe pack ./checkpoint --dtype bfloat16 --verify

      specmoe pack ./checkpoint --quantize int4
    """
    from specmoe_compile.system.output import check_writable, quiet_transformers, write_json

    check_writable(json)
    from specmoe_compile.bench.worker import peak_rss_bytes
    from specmoe_compile.hf.packing import pack as pack_store
    from specmoe_compile.system.sizes import format_bytes

    quiet_transformers()
    report = pack_store(
        model, store_dir, dtype=dtype, quantize=quantize, verify=verify, adapter=adapter
    )
    if report.reused:
        print(f"{report.path} already holds this store ({format_bytes(report.total_bytes)}).")
    else:
        resumed = f", {report.resumed_layers} layers already there" if report.resumed_layers else ""
        print(
            f"Packed {report.experts} experts of {report.layers} layers,"
            f" {format_bytes(report.total_bytes)}, into {report.path}"
            f" in {report.seconds:.1f} s{resumed}."
        )
    if json is not None:
        result: dict[str, Any] = asdict(report)
        result["path"] = str(report.path)
        write_json(json, {"schema": 1, **result, "peak_rss_bytes": peak_rss_bytes()})
