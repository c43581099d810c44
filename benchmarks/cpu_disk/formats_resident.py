"""What codes save where all experts are in memory: time per token, and of the experts alone.

The reference model with experts of 3 MiB (`--record-mib`) in bfloat16, and the same quantised, on a
CPU with everything resident and a static cache; forms in turns of one prompt each, in one process.
The experts alone are the ops of one step's layers, one token, over random choices of experts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import specmoe_compile
from benchmarks.cpu_disk.arms import take_turns, turns_parser
from benchmarks.end_to_end.run import RECORD_MIB, held_out_prompts
from benchmarks.kit.places import RESULTS
from specmoe_compile.bench.hf_generation import HuggingFaceGenerator
from specmoe_compile.bench.machine import provenance
from specmoe_compile.bench.records import spread
from specmoe_compile.bench.timing import TokenClock
from specmoe_compile.hf.attach import session_of
from specmoe_compile.reference_model.widened import widened_model
from specmoe_compile.system.output import quiet_transformers, write_json

RESULT = RESULTS / "formats_resident.json"
DTYPE = "bfloat16"
FORMS = (
    (None, "exact", 1.0),
    ("int4", "exact", 0.5),
    ("mxfp4", "exact", 0.5),
    ("int4", "int8", 0.3),
    ("mxfp4", "int8", 0.3),
)
"""Format, arithmetic, and the share of bfloat16's time that is asked for."""


class Arm:
    """The model in one form, all experts in memory."""

    def __init__(self, checkpoint: Path, folder: Path, form: str | None, math: str) -> None:
        self.form, self.math = form, math
        self.samples_ms: list[float] = []
        self.experts_ms: list[float] = []
        self.inner = specmoe_compile.from_pretrained(
            str(checkpoint),
            device="cpu",
            dtype=DTYPE,
            quantize=form,
            store="ram",
            expert_cache="100%",
            store_dir=str(folder),
            progress=False,
        )
        options: dict[str, Any] = {"prefetch": False, "cpu_math": math}
        model: Any = torch.compile(self.inner, backend="specmoe", options=options)
        static = {"cache_implementation": "static"}
        self._generator = HuggingFaceGenerator(model, self.inner, static)

    def turn(self, prompt: Sequence[int], new_tokens: int, *, counts: bool) -> None:
        """Generate once, then run the layers of 32 steps without the rest."""
        clock = TokenClock()
        with torch.inference_mode():
            self._generator.generate(list(prompt), new_tokens, clock)
            alone = self._experts_ms()
        if counts:
            self.samples_ms += clock.intervals_ms[1:]
            self.experts_ms += alone

    def _experts_ms(self, steps: int = 32) -> list[float]:
        config: Any = self.inner.config
        top_k, layers = config.num_experts_per_tok, config.num_hidden_layers
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, config.hidden_size, generator=generator).to(getattr(torch, DTYPE))
        weights = torch.full((1, top_k), 1 / top_k, dtype=x.dtype)
        handle, found = session_of(self.inner).handle, []
        for _ in range(steps):
            chosen = [
                torch.randperm(config.num_experts, generator=generator)[None, :top_k]
                for _ in range(layers)
            ]
            began = time.perf_counter()
            for layer, ids in enumerate(chosen):
                torch.ops.specmoe.experts(x, ids, weights, handle, layer)
            found.append((time.perf_counter() - began) * 1e3)
        return found

    def record(self, first: Arm, asked: float) -> dict[str, Any]:
        """What was found, against the first arm."""
        session = session_of(self.inner)
        config: Any = self.inner.config
        weights = 3 * config.hidden_size * config.moe_intermediate_size
        used = weights * config.num_experts_per_tok * config.num_hidden_layers
        return {
            "quantize": self.form,
            "cpu_math": self.math,
            "record_bytes": session.store.record_bytes,
            "tpot_ms": spread(self.samples_ms),
            "experts_ms": spread(self.experts_ms),
            "gweights_per_s_and_core": round(
                used / median(self.experts_ms) / 1e6 / torch.get_num_threads(), 3
            ),
            "ratio": round(median(self.samples_ms) / median(first.samples_ms), 4),
            "experts_ratio": round(median(self.experts_ms) / median(first.experts_ms), 4),
            "asked": asked,
        }


def measure(checkpoint: Path, folder: Path, prompts: int, new_tokens: int) -> list[dict[str, Any]]:
    """Every form in turn, forth and back."""
    arms = [Arm(checkpoint, folder / f"{form}", form, math) for form, math, _ in FORMS]
    take_turns(arms, held_out_prompts(prompts + 1), new_tokens, warm_up=1)
    rows = [arm.record(arms[0], asked) for arm, (_, _, asked) in zip(arms, FORMS, strict=True)]
    for arm in arms:
        specmoe_compile.close(arm.inner)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns 0, or 1 where a form takes more than it may."""
    parser = turns_parser("formats_resident", __doc__, result=RESULT, new_tokens=48)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--record-mib", type=float, default=RECORD_MIB, help="of one expert")
    arguments = parser.parse_args(argv)
    quiet_transformers()
    checkpoint = widened_model(arguments.folder, arguments.record_mib, DTYPE)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = measure(checkpoint, Path(folder), arguments.prompts, arguments.new_tokens)
    write_json(
        arguments.result,
        {
            "schema": 1,
            **provenance(),
            "threads": torch.get_num_threads(),
            "settings": {
                "prompts": arguments.prompts,
                "new_tokens": arguments.new_tokens,
                "record_mib": arguments.record_mib,
            },
            "seed": 0,
            "forms": rows,
        },
    )
    for row in rows:
        print(
            row["quantize"],
            row["cpu_math"],
            f"token {row['tpot_ms']['p50']:.2f} ms, {row['ratio']:.3f}",
            f"experts {row['experts_ms']['p50']:.2f} ms, {row['experts_ratio']:.3f},",
            f"{row['gweights_per_s_and_core']:.1f} G weights/s and core",
        )
    return 0 if all(r["ratio"] <= r["asked"] for r in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
