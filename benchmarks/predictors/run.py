"""Predictors of experts on equal terms, on the reference model: one table.

    python -m benchmarks predictors                   # everything, on a quiet machine
    python -m benchmarks predictors --only report     # the document from the result file

Phases: `recall` (default vectors and networks from training files, recall on held-out files, as
`specmoe calibrate --train-estimator` does it), `cost` (time to predict one token's experts),
`timing` and `no_cache` (time per token of the widened model with each predictor, interleaved: with
a cache, and without one, as in the paper), `report` (docs/results/log/predictors.md). Results are
benchmarks/results/predictors.json, phase by phase.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import specmoe_compile
from benchmarks.end_to_end.run import EXPERT_CACHE, PROMPT_TOKENS, RECORD_MIB, held_out_prompts
from benchmarks.kit.command import run_parser
from benchmarks.kit.paired import PairedArm, run_paired
from benchmarks.kit.places import LOG, RESULTS
from benchmarks.kit.traffic import predicted_share
from benchmarks.predictors.cost import measure_cost
from benchmarks.predictors.report import write_report
from benchmarks.reference_model.data import (
    HELD_OUT_FILES,
    default_source,
    held_out_windows,
    read_training_tokens,
    sample_starts,
    training_files,
)
from benchmarks.reference_model.tokenizer import PAD_ID
from specmoe_compile.bench.harness import run_pack
from specmoe_compile.bench.machine import provenance
from specmoe_compile.bench.records import ArmJob
from specmoe_compile.calibrate.calibration import Calibration, calibrate, fingerprint
from specmoe_compile.cli.bench import describe_model
from specmoe_compile.hf.attach import session_of
from specmoe_compile.predict.registry import PREDICTORS
from specmoe_compile.predict.training import TrainingConfig
from specmoe_compile.reference_model import CHECKPOINT_DIR
from specmoe_compile.reference_model.widened import widened_model
from specmoe_compile.system.machine import cache_folder
from specmoe_compile.system.output import quiet_transformers, write_json

REPORT = LOG / "predictors.md"
PHASES = ("recall", "cost", "timing", "no_cache", "report")
DTYPE = "float32"
WINDOW = 512
BATCH = 4
SEED = 0
BASELINE = "none"
"""The arm with the same cache, or none, and no prefetch."""
ARMS = {"timing": ("cache", "specmoe"), "no_cache": ("on_demand", "prefetch")}
"""By phase, the arm without and the arm with predictions."""


class Place:
    """Where models, artefacts and results are, and how much to run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder: Path = arguments.folder
        self.result: Path = arguments.results / "predictors.json"
        self.windows: int = arguments.windows
        self.held_out: int = arguments.held_out
        self.epochs: int = arguments.epochs
        self.repeats: int = arguments.repeats
        self.new_tokens: int = arguments.new_tokens
        self.auto_off: bool = arguments.auto_off

    @property
    def artefact(self) -> Path:
        """Calibration of the reference model itself."""
        return self.folder / "predictors.safetensors"

    @property
    def widened_artefact(self) -> Path:
        """The same for the widened model, which computes the same."""
        return self.folder / "predictors-widened.safetensors"

    def model(self) -> Path:
        """The widened reference model, made when it is not there."""
        return widened_model(self.folder, RECORD_MIB, DTYPE)

    def store_dir(self) -> Path:
        """Where its expert store is or will be."""
        return self.folder / f"{self.model().name}-store"

    def write(self, phase: str, value: dict[str, Any]) -> None:
        """Put one phase's result into the file, with what it was measured on."""
        found = json.loads(self.result.read_text("utf-8")) if self.result.is_file() else {}
        found[phase] = {
            **provenance(),
            "load_average": list(os.getloadavg()),
            **value,
        }
        self.result.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.result, {"schema": 1, **found})
        print(f"wrote {phase} to {self.result.name}", flush=True)


def _texts(place: Place) -> tuple[Tensor, Tensor]:
    """Windows of training files and of held-out files, both [N, W] int64."""
    tokens = read_training_tokens(training_files(default_source()))
    starts = sample_starts(tokens.numel(), window=WINDOW, steps=1, batch=place.windows, seed=SEED)[
        0
    ]
    learned = torch.stack([tokens[start : start + WINDOW] for start in starts.tolist()]).long()
    held_out = held_out_windows(default_source(), WINDOW)
    held_out = held_out[(held_out != PAD_ID).all(dim=1)][:, :-1]
    picks = torch.linspace(0, len(held_out) - 1, place.held_out).round().long()
    return learned, held_out[picks]


def run_recall(place: Place) -> None:
    """Train on training files, measure on held-out ones."""
    learned, held_out = _texts(place)
    model = specmoe_compile.from_pretrained(
        CHECKPOINT_DIR, device="cpu", dtype=DTYPE, store="ram", progress=False
    )
    started = time.perf_counter()
    result = calibrate(
        model,
        learned,
        name="reference model",
        held_out=held_out,
        batch=BATCH,
        training=TrainingConfig(epochs=place.epochs, seed=SEED),
    )
    seconds = time.perf_counter() - started
    place.folder.mkdir(parents=True, exist_ok=True)
    result.save(place.artefact)
    specmoe_compile.close(model)
    place.write(
        "recall",
        {
            "tokens": result.tokens,
            "held_out_tokens": result.measured_tokens,
            "held_out_files": list(HELD_OUT_FILES),
            "window": WINDOW,
            "seed": SEED,
            "seconds": seconds,
            "threads": torch.get_num_threads(),
            # Every token adds K samples.
            "top_k": int(result.samples[0].sum()) // result.tokens,
            "predictors": {name: _recall(result, name) for name in PREDICTORS},
        },
    )


def _recall(result: Calibration, name: str) -> dict[str, Any]:
    """What a predictor is worth by layer, and what it took."""
    chosen = result.network_layers(name)
    trained = result.trained.get("estimator" if chosen else name)
    vectors = sum(table.numel() for table in result.default_vectors[:-1])
    networks = [] if trained is None else list(enumerate(trained.networks))
    if chosen:
        networks = [(index, n) for index, n in networks if index in chosen]
    reads_vectors = PREDICTORS[name].state == "quasi"
    whole: list[float | None]
    if chosen and trained is not None:
        whole = [
            trained.whole[i] if i in chosen else layer.whole
            for i, layer in enumerate(result.layers)
        ]
    elif trained is not None:
        whole = list(trained.whole)
    else:
        field = {"residual": "residual_whole", "previous_token": "previous_whole"}.get(
            name, "whole"
        )
        whole = [getattr(layer, field) for layer in result.layers]
    return {
        "recall": list(result.recall_of(name)),
        "whole": whole,
        "network_layers": list(chosen),
        "default_vector_parameters": vectors if reads_vectors else 0,
        "network_parameters": sum(n.parameters for _, n in networks if n is not None),
        "training_tokens": trained.tokens if trained is not None else 0,
        "epochs": trained.epochs if trained is not None else 0,
        "training_s": trained.seconds if trained is not None else 0.0,
    }


def run_timing(place: Place, phase: str) -> None:
    """Time per token with each predictor and without any, in turns within this process."""
    without, predicting = ARMS[phase]
    prompts = held_out_prompts(3)
    _write_widened_artefact(place)
    jobs = {}
    with tempfile.TemporaryDirectory(dir=place.folder) as work:
        run_pack(str(place.model()), str(place.store_dir()), DTYPE, cap=None, work_dir=work)
        for name in (BASELINE, *PREDICTORS):
            options: dict[str, Any] = {"auto_off": place.auto_off}
            if name != BASELINE:
                options |= {"prefetch": True, "predictor": name}
                options["default_vectors"] = str(place.widened_artefact)
            jobs[name] = ArmJob(
                arm=without if name == BASELINE else predicting,
                model=str(place.model()),
                prompts=prompts,
                new_tokens=place.new_tokens,
                device="cpu",
                dtype=DTYPE,
                expert_cache=EXPERT_CACHE,
                store_dir=str(place.store_dir()),
                options=options,
                work_dir=work,
            )
        arms, different = run_paired(jobs, place.repeats)
    place.write(
        phase if place.auto_off else f"{phase}_always",
        {
            "model": describe_model(str(place.model()), DTYPE),
            "expert_cache": EXPERT_CACHE if phase == "timing" else None,
            "auto_off": place.auto_off,
            "prompts": len(prompts),
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": place.new_tokens,
            "repeats": place.repeats,
            "different_token_lists": different,
            "arms": {name: _arm(arm) for name, arm in arms.items()},
        },
    )


def _write_widened_artefact(place: Place) -> None:
    """Give the calibration the widened model's name; copies of neurons change no output."""
    wide: Any = specmoe_compile.from_pretrained(
        place.model(),
        device="cpu",
        dtype=DTYPE,
        store="disk",
        expert_cache=EXPERT_CACHE,
        store_dir=place.store_dir(),
        progress=False,
    )
    name = fingerprint(session_of(wide))
    specmoe_compile.close(wide)
    replace(Calibration.load(place.artefact), fingerprint=name).save(place.widened_artefact)


def _arm(arm: PairedArm) -> dict[str, Any]:
    total, samples = arm.total, arm.samples_ms
    return {
        "tpot_ms": arm.tpot_ms,
        "medians_ms": [median(round_ms) for round_ms in samples],
        "samples_ms": [[round(ms, 2) for ms in round_ms] for round_ms in samples],
        "recall": total["recalled"] / total["needed"] if total["needed"] else None,
        "predicted_share": predicted_share(total),
        "total": total,
        "notes": arm.notes,
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = run_parser("predictors", __doc__)
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--windows", type=int, default=128, help=f"of {WINDOW} training tokens")
    parser.add_argument("--held-out", type=int, default=64, help="windows to measure on")
    parser.add_argument("--epochs", type=int, default=10, help="of the networks")
    parser.add_argument("--repeats", type=int, default=3, help="of timing")
    parser.add_argument("--new-tokens", type=int, default=64, help="per prompt of timing")
    parser.add_argument(
        "--auto-off",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let prefetches that do not pay be turned off",
    )
    parser.add_argument("--folder", type=Path, default=cache_folder() / "demo")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--report", type=Path, default=REPORT, help="the document to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the phases asked for; returns 0, or 2 for what a caller can correct."""
    arguments = parse_arguments(argv)
    place = Place(arguments)
    quiet_transformers()
    phases: dict[str, Callable[[], None]] = {
        "recall": lambda: run_recall(place),
        "cost": lambda: place.write("cost", measure_cost(place.artefact)),
        "timing": lambda: run_timing(place, "timing"),
        "no_cache": lambda: run_timing(place, "no_cache"),
        "report": lambda: write_report(place.result, arguments.report),
    }
    for name, run in phases.items():
        if name in arguments.only:
            print(f"== {name}", flush=True)
            run()
    return 0
