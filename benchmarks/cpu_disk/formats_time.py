"""Time per token of `quantize=` forms against float32 records, on a CPU with experts on disk.

The reference model with experts of 3 MiB, activations in float32, the same number of cache slots in
every form, no prefetch; forms in turns of one prompt each, in one process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import specmoe_compile
from benchmarks.cpu_disk.arms import take_turns, turns_parser
from benchmarks.cpu_disk.policies import Arm
from benchmarks.end_to_end.run import RECORD_MIB, held_out_prompts
from benchmarks.kit.places import RESULTS
from specmoe_compile.bench.machine import provenance
from specmoe_compile.hf.attach import session_of
from specmoe_compile.reference_model.widened import widened_model
from specmoe_compile.system.output import quiet_transformers, write_json

RESULT = RESULTS / "formats_time.json"
AT_MOST = 0.4
"""Of float32's time, for int4."""


def measure(
    checkpoint: Path, folder: Path, forms: Sequence[str | None], prompts: int, new_tokens: int
) -> list[dict[str, Any]]:
    """Every form in turn, forth and back."""
    arms = [Arm(checkpoint, folder / str(f), "25%", "adaptive", quantize=f) for f in forms]
    take_turns(arms, held_out_prompts(prompts + 1), new_tokens, warm_up=2)
    rows = []
    for form, arm in zip(forms, arms, strict=True):
        pairs = zip(arm.turns_ms, arms[0].turns_ms, strict=True)
        store = session_of(arm.inner).store
        rows.append(
            {
                "quantize": form,
                "experts": store.numbers,
                "record_bytes": store.record_bytes,
                **arm.record(),
                "ratio": sum(arm.samples_ms) / sum(arms[0].samples_ms),
                "ratio_of_turns": median(a / b for a, b in pairs),
            }
        )
    for arm in arms:
        specmoe_compile.close(arm.inner)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns 0, or 1 where int4 takes more than it may."""
    parser = turns_parser("formats_time", __doc__, result=RESULT, new_tokens=48)
    parser.add_argument("--forms", nargs="+", default=["int4"])
    parser.add_argument("--prompts", type=int, default=6)
    arguments = parser.parse_args(argv)
    quiet_transformers()
    checkpoint = widened_model(arguments.folder, RECORD_MIB, "float32")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = measure(
            checkpoint,
            Path(folder),
            [None, *arguments.forms],
            arguments.prompts,
            arguments.new_tokens,
        )
    write_json(
        arguments.result,
        {
            "schema": 1,
            **provenance(),
            "load_average": list(os.getloadavg()),
            "expert_cache": "25%",
            "settings": {"prompts": arguments.prompts, "new_tokens": arguments.new_tokens},
            "forms": rows,
        },
    )
    for row in rows:
        print(row["experts"], row["tpot_ms"], f"mean {row['mean_ms']:.2f}", f"{row['ratio']:.3f}")
    return 0 if all(r["ratio"] <= AT_MOST for r in rows if r["quantize"] == "int4") else 1


if __name__ == "__main__":
    raise SystemExit(main())
