"""Kernels of coded experts on a GPU: each launch in several configurations, against the floor.

Part of `benchmarks gpu_first_run` (phase `packed`). The floor is the bytes of the codes and planes
that a launch reads over the measured bandwidth of device memory. Launches are timed in replayed
CUDA graphs of many calls over several banks, so that no call finds its weights in L2.

Shape letters: T tokens, K top-k, H hidden, I expert intermediate, S slots.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from benchmarks.full_size.model import draw_planes
from benchmarks.kernels.compile_spec import PACKED_SHAPES, ModelShape
from specmoe_compile.kernels.expert_mlp.config import GemvConfig
from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm
from specmoe_compile.runtime.experts.layout import ExpertLayout

CALLS = 32
ROTATED_BYTES = 1 << 30
TOKENS = (1, 2, 4, 16)
PREFILL_TOKENS = (64, 1024)
BUILDERS = 12  # processes that compile before anything is timed

Launch = Literal["gate_up", "down"]

CASES = ("Qwen3-30B-A3B nvfp4", "Qwen3-30B-A3B fp8", "Qwen3-30B-A3B int4", "GPT-OSS-20B mxfp4")


class Rig(Protocol):
    """What `gpu_first_run.Rig` offers."""

    dry: bool

    @property
    def device(self) -> str: ...

    def median_ms(self, run: Callable[[int], object], repeats: int = 30) -> float: ...

    def captured(self, run: Callable[[], object]) -> Callable[[int], object]: ...


@dataclass(frozen=True, slots=True)
class Case:
    """A model's shape and the format of its experts."""

    name: str
    shape: ModelShape
    form: ExpertForm

    @classmethod
    def of(cls, name: str, *, dry: bool) -> Case:
        """The case of that name; dry, a tiny one."""
        from benchmarks.kernels.variants.expert_mlp import form_of_shape

        shape = next(one for one in PACKED_SHAPES if one.name == name)
        if dry:
            shape = replace(shape, hidden=64, intermediate=32, num_experts=8)
        return cls(name, shape, form_of_shape(shape))

    def banks(self, device: str, *, count: int | None = None) -> list[ExpertBank]:
        """Banks of random experts that together pass the L2 many times."""
        shape = self.shape
        sizes: dict[str, tuple[int, ...]] = {"gate_up_proj": (shape.up_rows, shape.hidden)}
        if shape.has_bias:
            sizes["gate_up_proj_bias"] = (shape.up_rows,)
        sizes["down_proj"] = (shape.hidden, shape.intermediate)
        if shape.has_bias:
            sizes["down_proj_bias"] = (shape.hidden,)
        format = self.form.format
        tensors = format.tensors(sizes, dict.fromkeys(sizes, torch.bfloat16))
        layout = ExpertLayout.from_shapes(tensors, format)
        slots = min(shape.num_experts, 32)
        if count is None:
            count = 1 if device == "cpu" else ROTATED_BYTES // (slots * layout.record_bytes) + 1
        banks: list[ExpertBank] = []
        generator = torch.Generator(device).manual_seed(0)
        for _ in range(count):
            records = torch.empty(slots, layout.record_bytes, dtype=torch.uint8, device=device)
            views = layout.bank_views(records)
            for name in ("gate_up_proj", "down_proj"):
                draw_planes(views, name, format.code(name), 0.02, generator)
            for name, view in views.items():
                if name.endswith("_bias"):
                    view.normal_(std=0.02)
            banks.append(ExpertBank.from_views(views))
        return banks

    def bytes_of(self, launch: Launch) -> int:
        """Bytes of one expert that a launch reads."""
        return self.shape.up_bytes if launch == "gate_up" else self.shape.down_bytes


def configs(case: Case, launch: Launch) -> list[GemvConfig]:
    """The default first, then others to choose from."""
    from specmoe_compile.kernels.packed_experts.config import down_config, gate_up_config

    shape, format = case.shape, case.form.format
    wide = format.up.functions.bits == 8
    if launch == "gate_up":
        first = gate_up_config(shape.hidden, format.up, has_gate=True)
        others = [
            GemvConfig(block_out=o, block_in=i // 2 if wide else i, num_warps=w, num_stages=s)
            for o, i, w, s in (
                (8, 2048, 4, 1),
                (16, 2048, 8, 1),
                (8, 1024, 4, 1),
                (16, 1024, 8, 1),
                (8, 1024, 4, 2),
                (4, 1024, 2, 1),
                (8, 512, 4, 1),
                (4, 4096, 4, 1),
            )
        ]
    else:
        first = down_config(shape.intermediate, shape.top_k, format.down)
        others = [
            replace(first, block_out=o, block_in=i // 2 if wide else i, num_warps=w, num_stages=s)
            for o, i, w, s in (
                (4, 256, 4, 1),
                (8, 256, 8, 1),
                (4, 256, 2, 1),
                (8, 256, 4, 1),
                (8, 512, 4, 1),
                (4, 512, 4, 1),
                (8, 512, 4, 3),
                (4, 512, 4, 4),
                (4, 1024, 8, 1),
            )
        ]
    return list(dict.fromkeys([first, *others]))


@dataclass(frozen=True, slots=True)
class Inputs:
    """x [T, H], weights [T, K], slots of each call [T, K], intermediate [T, K, I], out [T, H]."""

    x: Tensor
    weights: Tensor
    slots: list[Tensor]
    intermediate: Tensor
    out: Tensor

    @classmethod
    def draw(cls, case: Case, tokens: int, slots: int, device: str, *, late: int | None) -> Inputs:
        """Random tokens; with `late` so many choices of a token have a slot."""
        shape = case.shape
        chosen = [
            torch.stack([torch.randperm(slots)[: shape.top_k] for _ in range(tokens)]).int()
            for _ in range(CALLS)
        ]
        if late is not None:
            for one in chosen:
                one[:, late:] = -1

        def random(*size: int) -> Tensor:
            return torch.randn(size, device=device).bfloat16()

        return cls(
            random(tokens, shape.hidden),
            random(tokens, shape.top_k),
            [one.to(device) for one in chosen],
            random(tokens, shape.top_k, shape.intermediate),
            random(tokens, shape.hidden),
        )


def launch_all(
    case: Case, launch: Launch, inputs: Inputs, banks: Sequence[ExpertBank], config: GemvConfig
) -> None:
    """One call on each list of slots, on one bank after the other."""
    from specmoe_compile.kernels.packed_experts.launch import (
        launch_packed_down,
        launch_packed_gate_up,
    )

    vectors = inputs.x.new_empty(1, dtype=torch.float32)
    for slots, bank in zip(inputs.slots, itertools.cycle(banks), strict=False):
        if launch == "gate_up":
            launch_packed_gate_up(
                inputs.x, slots, bank, case.form, inputs.intermediate, config=config
            )
        else:
            launch_packed_down(
                inputs.intermediate,
                slots,
                inputs.weights,
                bank,
                case.form,
                inputs.out,
                partial=inputs.intermediate,
                skipped=slots,
                default_vectors=vectors,
                y=inputs.intermediate,
                reads=(0, 0, 0),
                config=config,
            )


def _build(name: str, launch: Launch, config: GemvConfig) -> float:
    """Compile one launch, so that it is found in the cache; seconds. Runs in its own process."""
    started = time.perf_counter()
    case = Case.of(name, dry=False)
    bank = case.banks("cuda", count=1)
    inputs = Inputs.draw(case, 1, bank[0].up.shape[0], "cuda", late=None)
    launch_all(case, launch, replace(inputs, slots=inputs.slots[:1]), bank, config)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _jobs(names: Sequence[str], *, dry: bool) -> Iterator[tuple[str, Launch, GemvConfig]]:
    launches: tuple[Launch, ...] = ("gate_up", "down")
    for name in names:
        case = Case.of(name, dry=dry)
        for launch in launches:
            for config in configs(case, launch):
                yield name, launch, config


def build_all(names: Sequence[str]) -> None:
    """Compile everything at once, in several processes."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(BUILDERS, mp_context=spawn) as pool:
        jobs = [pool.submit(_build, *job) for job in _jobs(names, dry=False)]
        print(f"compiled {len(jobs)} launches, {sum(job.result() for job in jobs):.0f} s of work")


def measure_packed(rig: Rig, bandwidth_gbps: float) -> dict[str, list[dict[str, Any]]]:
    """Every configuration for one token; the default for more tokens, late choices, prefill."""
    names = list(CASES)
    if rig.dry and os.environ.get("TRITON_INTERPRET") != "1":
        print("the kernels run on a CPU only with TRITON_INTERPRET=1")
        return {"launches": [], "prefill": []}
    if not rig.dry:
        build_all(names)
    rows: list[dict[str, Any]] = []
    prefill: list[dict[str, Any]] = []
    for name in names:
        case = Case.of(name, dry=rig.dry)
        banks = case.banks(rig.device)
        for launch in ("gate_up", "down"):
            for place, config in enumerate(configs(case, launch)):
                for tokens, late in _situations(default=place == 0, dry=rig.dry):
                    row = _timed(rig, case, launch, banks, config, tokens, late, bandwidth_gbps)
                    rows.append(row)
        if not rig.dry:  # `run_grouped_experts_` on the CPU is plain torch
            prefill += _prefill(rig, case, banks[0])
        del banks
        if not rig.dry:
            torch.cuda.empty_cache()
    return {"launches": rows, "prefill": prefill}


def _situations(*, default: bool, dry: bool) -> list[tuple[int, int | None]]:
    if not default or dry:
        return [(1, None)]
    return [(1, None), (1, 1), *((tokens, None) for tokens in TOKENS[1:])]


def _timed(
    rig: Rig,
    case: Case,
    launch: Launch,
    banks: Sequence[ExpertBank],
    config: GemvConfig,
    tokens: int,
    late: int | None,
    bandwidth_gbps: float,
) -> dict[str, Any]:
    inputs = Inputs.draw(case, tokens, banks[0].up.shape[0], rig.device, late=late)
    if rig.dry:
        inputs = replace(inputs, slots=inputs.slots[:1])
    run = partial(launch_all, case, launch, inputs, banks, config)
    run()
    call_us = rig.median_ms(rig.captured(run), 15) / len(inputs.slots) * 1e3
    distinct = sum(len(set(s[s >= 0].tolist())) for s in inputs.slots) / len(inputs.slots)
    floor_us = distinct * case.bytes_of(launch) / bandwidth_gbps / 1e3
    row = {
        "case": case.name,
        "launch": launch,
        "tokens": tokens,
        "late": late,
        "block_out": config.block_out,
        "block_in": config.block_in,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "call_us": call_us,
        "floor_us": floor_us,
        "over_floor": call_us / floor_us,
    }
    shape = f"{config.block_out}x{config.block_in} w{config.num_warps} s{config.num_stages}"
    print(
        f"{case.name:21s} {launch:8s} T={tokens:<2d} late={late!s:5s} {shape:16s}"
        f" {call_us:7.2f} us, floor {floor_us:6.2f}, {call_us / floor_us:.2f}",
        flush=True,
    )
    return row


def _prefill(rig: Rig, case: Case, bank: ExpertBank) -> list[dict[str, Any]]:
    """`run_grouped_experts_` of one layer's slots, and what expanding them costs alone."""
    from specmoe_compile.kernels.grouped_experts.op import run_grouped_experts_
    from specmoe_compile.kernels.packed_experts.expand import launch_expand, matrix_dtype

    rows: list[dict[str, Any]] = []
    shape, slots = case.shape, bank.up.shape[0]
    code = case.form.format.up
    used = torch.ones(slots, dtype=torch.int32, device=rig.device)
    matrix = torch.empty(
        (slots, shape.up_rows, shape.hidden),
        dtype=matrix_dtype(code, torch.bfloat16),
        device=rig.device,
    )
    expand_ms = rig.median_ms(lambda _: launch_expand(bank.up_planes, code, used, matrix), 10)
    for tokens in PREFILL_TOKENS:
        x = torch.randn(tokens, shape.hidden, device=rig.device).bfloat16()
        ids = torch.stack([torch.randperm(slots)[: shape.top_k] for _ in range(tokens)])
        ids = ids.int().to(rig.device)
        y = x.new_empty((tokens, shape.top_k, shape.hidden))
        layer_ms = rig.median_ms(
            lambda _, y=y, x=x, ids=ids: run_grouped_experts_(  # type: ignore[misc]
                y, x, ids, bank, case.form
            ),
            10,
        )
        rows.append(
            {
                "case": case.name,
                "tokens": tokens,
                "slots": slots,
                "layer_ms": layer_ms,
                "expand_up_ms": expand_ms,
            }
        )
        print(
            f"{case.name:21s} prefill T={tokens}, {slots} experts: {layer_ms:.3f} ms, of which"
            f" expanding the up projections {expand_ms:.3f}",
            flush=True,
        )
    return rows
