"""Check a family end to end: offloaded and plain, against the unmodified eager model."""

from __future__ import annotations

import contextlib
import gc
import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import specmoe_compile
from specmoe_compile.hf.attach import session_of
from specmoe_compile.hf.compiled_calls import cache_argument
from specmoe_compile.passes import manager
from specmoe_compile.passes.choose_predictions import FIRST_LAYER, PREFILL
from specmoe_compile.passes.guard_speculation import NOT_FIXED
from specmoe_compile.passes.report import PipelineReport
from specmoe_compile.runtime.experts.module import is_experts_module
from tests.models.describe import Description, describe
from tests.models.families import Family, build
from tests.models.tiny_configs import VOCABULARY
from tests.runtime.test_packing import assert_holds_model

NEW_TOKENS = 24
PROMPT = 9
# Inductor and the decompositions sum norms and softmax in another order than eager PyTorch, and
# four layers and up to 24 tokens amplify it; a wrong expert changes logits by 0.1 and more.
LOGITS_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to generate: kind of cache, batch, and how the graph is lowered.

    With `predicts=False` options are as they come, and on a CPU with a cache nothing is predicted.
    """

    cache: str
    batch: int
    lowering: str = "eager"
    predicts: bool = True

    def __str__(self) -> str:
        words = f"{self.cache} cache, batch {self.batch}, {self.lowering}"
        return words if self.predicts else f"{words}, without predictions"


# Generating code takes most of the time, and the rewritten graphs are the same without: Inductor
# lowers one case of each family.
INDUCTOR = Case(cache="static", batch=1, lowering="inductor")
OFFLOADED = (
    INDUCTOR,
    Case(cache="static", batch=3),
    Case(cache="dynamic", batch=1),
    Case(cache="dynamic", batch=3),
    Case(cache="static", batch=1, predicts=False),
)
PLAIN = (Case(cache="static", batch=3),)
# One case each, for the fast tests, which check many families in a minute and a half.
QUICK_STATIC = Case(cache="static", batch=3)
QUICK_DYNAMIC = Case(cache="dynamic", batch=1)
QUICK_SILENT = Case(cache="static", batch=3, predicts=False)
QUICK_TOKENS = 8


@dataclass(slots=True)
class Run:
    """What one way of running gave.

    Attributes:
        tokens: [batch, new tokens] int64.
        logits: [batch, new tokens, vocabulary] float32.
        error: the exception, when there is no result.
        graph_breaks: reason -> how often.
        reports: of the passes, one per graph that dispatches experts.
        seconds: time, compilation included.
    """

    tokens: Tensor | None = None
    logits: Tensor | None = None
    error: str | None = None
    graph_breaks: dict[str, int] = field(default_factory=dict)
    reports: list[PipelineReport] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(slots=True)
class Check:
    """Everything that was seen of one family.

    Attributes:
        layers_in_model, layers_found: experts modules of the model; layers of its session.
        description: its router and experts.
        reference: the unmodified eager model, by (cache, batch).
        offloaded, plain: the compiled models, by case.
        stock_graph_breaks: those of the unmodified model, compiled by PyTorch alone with the caches
            and batches whose offloaded runs break; empty where none breaks.
    """

    family: Family
    layers_in_model: int
    layers_found: int
    description: Description
    reference: dict[tuple[str, int], Run] = field(default_factory=dict)
    offloaded: dict[Case, Run] = field(default_factory=dict)
    plain: dict[Case, Run] = field(default_factory=dict)
    stock_graph_breaks: dict[str, int] = field(default_factory=dict)

    def impossible(self) -> dict[tuple[str, int], str]:
        """(cache, batch) -> why the unmodified eager model itself cannot do it."""
        return {key: run.error for key, run in self.reference.items() if run.error is not None}

    def differences(self) -> list[str]:
        """What is not as the eager model has it; none is exact."""
        found = []
        if self.layers_found != self.layers_in_model:
            found.append(f"{self.layers_found} of {self.layers_in_model} MoE layers found")
        for how, runs in (("offloaded", self.offloaded), ("plain", self.plain)):
            for case, run in runs.items():
                reason = difference(self.reference[case.cache, case.batch], run)
                if reason is not None:
                    found.append(f"{how}, {case}: {reason}")
        return found

    def graph_breaks(self) -> dict[str, int]:
        """Reason -> how often Dynamo broke the graph of the offloaded model, over all cases."""
        reasons: dict[str, int] = {}
        for run in self.offloaded.values():
            for reason, count in run.graph_breaks.items():
                reasons[reason] = reasons.get(reason, 0) + count
        return reasons

    def predicted(self) -> int:
        """MoE layers predicted in the graph that predicts fewest, graphs of prefill left out."""
        counts = [r.matches["insert_expert_prefetch"] for r in self.decode_reports()]
        return min(counts, default=0)

    def unpredicted(self) -> dict[int, str]:
        """MoE layer -> why some graph does not predict it.

        Left out: the first layer, and graphs of prefill, where sessions predict nothing.
        """
        reasons: dict[int, str] = {}
        for report in self.decode_reports():
            for layer, reason in report.skipped.items():
                if (layer, reason) != (0, FIRST_LAYER) and reason != NOT_FIXED:
                    reasons.setdefault(layer, reason)
        return dict(sorted(reasons.items()))

    def decode_reports(self) -> list[PipelineReport]:
        """Those of graphs that are not of prefill, and are to be predicted."""
        predicting = [run for case, run in self.offloaded.items() if case.predicts]
        reports = [report for run in predicting for report in run.reports]
        return [report for report in reports if PREFILL not in report.skipped.values()]


def inputs(batch: int, *, length: int = PROMPT) -> dict[str, Tensor]:
    """Random prompts of different lengths, padded on the left; row 0 has no padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCABULARY - 6, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        ids[row, : 2 * row] = 0
        mask[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def difference(want: Run, got: Run) -> str | None:
    """Say how a run differs from the eager model's; None if it does not."""
    if got.error is not None:
        return got.error
    assert want.tokens is not None and want.logits is not None
    assert got.tokens is not None and got.logits is not None
    if want.tokens.shape != got.tokens.shape:
        return f"{tuple(got.tokens.shape)} tokens instead of {tuple(want.tokens.shape)}"
    same = (want.tokens == got.tokens).all(dim=0)
    if not same.all():
        return f"other tokens from step {int(same.int().argmin())} of {len(same)} on"
    largest = float((want.logits - got.logits).abs().max())
    if not largest <= LOGITS_TOLERANCE:
        return f"logits differ by {largest:.2g}"
    return None


def generate(model: Any, cache: str, batch: int, new_tokens: int = NEW_TOKENS) -> Run:
    """Generate greedily; an exception becomes the run's `error`."""
    run = Run()
    started = time.perf_counter()
    torch.manual_seed(0)
    torch._dynamo.utils.counters.clear()
    forward = getattr(model, "_orig_mod", model).forward
    denoises = "decoder_input_ids" in inspect.signature(forward).parameters
    produce = _denoise if denoises else _decode
    try:
        with torch.no_grad(), recorded_reports(run.reports):
            run.tokens, run.logits = produce(model, cache, batch, new_tokens)
    except Exception as error:  # the walk reports it in the family's row
        run.error = f"{type(error).__name__}: {error}"
    run.graph_breaks = dict(torch._dynamo.utils.counters["graph_break"])
    run.seconds = time.perf_counter() - started
    return run


def _decode(model: Any, cache: str, batch: int, new_tokens: int) -> tuple[Tensor, Tensor]:
    """Token after token: tokens, [batch, new tokens], and logits, [batch, new tokens, V]."""
    kwargs = {"cache_implementation": "static"} if cache == "static" else {}
    out = model.generate(
        **inputs(batch),
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return out.sequences[:, PROMPT:], torch.stack(out.logits, dim=1)


def _denoise(model: Any, cache: str, batch: int, new_tokens: int) -> tuple[Tensor, Tensor]:
    """Steps that each choose a whole canvas anew: its tokens, and the logits of the last step.

    The generation of such models draws random numbers, which the smallest difference diverts.
    """
    length = model.config.canvas_length
    canvas = inputs(batch, length=length)["input_ids"].flip(1)
    for _ in range(new_tokens):
        config = model.config.get_text_config()
        kept = (
            StaticCache(config=config, max_cache_len=PROMPT + length)
            if cache == "static"
            else DynamicCache(config=config)
        )
        logits = model(
            **inputs(batch), decoder_input_ids=canvas, **cache_argument(model, kept)
        ).logits
        canvas = logits.argmax(-1)
    return canvas, logits


@contextlib.contextmanager
def recorded_reports(into: list[PipelineReport]) -> Iterator[None]:
    """Collect what the passes report about every graph compiled in this block."""
    run_passes = manager.run_passes

    def recording(*args: Any, **kwargs: Any) -> PipelineReport:
        report = run_passes(*args, **kwargs)
        into.append(report)
        return report

    manager.run_passes = recording  # type: ignore[assignment]
    try:
        yield
    finally:
        manager.run_passes = run_passes  # type: ignore[assignment]


def check_family(
    family: Family,
    folder: Path,
    *,
    offloaded: Sequence[Case] = OFFLOADED,
    plain: Sequence[Case] = PLAIN,
    new_tokens: int = NEW_TOKENS,
) -> Check:
    """Run a family in every way and compare.

    Args:
        family: one with a generating class.
        folder: empty folder; its checkpoint and its expert store go there.
        offloaded: cases of the model with its experts on disk.
        plain: cases of the plain model, compiled in place.
        new_tokens: how many each case generates.
    """
    model_class: Any = family.model_class
    build(family).save_pretrained(folder / "model")
    reference = model_class.from_pretrained(folder / "model").eval()
    loaded = specmoe_compile.from_pretrained(
        folder / "model",
        device="cpu",
        store="disk",
        expert_cache="50%",
        store_dir=folder / "store",
        progress=False,
    )
    session = session_of(loaded)
    assert_holds_model(session.store, reference)
    check = Check(
        family=family,
        layers_in_model=sum(map(is_experts_module, reference.modules())),
        layers_found=len(session.layers),
        description=describe(reference, inputs(1)["input_ids"]),
    )
    for case in dict.fromkeys((*offloaded, *plain)):
        key = (case.cache, case.batch)
        if key not in check.reference:
            # Transformers would compile where there is a GPU; this is the eager model.
            reference.generation_config.disable_compile = True
            check.reference[key] = generate(reference, *key, new_tokens)
    possible = [key for key, run in check.reference.items() if run.error is None]
    try:
        _run_compiled(loaded, offloaded, possible, check.offloaded, new_tokens)
    finally:
        specmoe_compile.close(loaded)
    _run_plain(model_class, folder, plain, possible, check.plain, new_tokens)
    for key in {(c.cache, c.batch) for c, run in check.offloaded.items() if run.graph_breaks}:
        reference.compile(backend="eager")
        check.stock_graph_breaks |= generate(reference, *key, new_tokens).graph_breaks
        torch._dynamo.reset()
    return check


def _run_compiled(
    model: Any,
    cases: Sequence[Case],
    possible: Sequence[tuple[str, int]],
    into: dict[Case, Run],
    new_tokens: int,
) -> None:
    """Generate with `torch.compile(model)`, one compiled function for all with the same options."""
    for lowering, predicts in dict.fromkeys((case.lowering, case.predicts) for case in cases):
        options = {"lowering": lowering, "prefetch": True if predicts else "auto"}
        compiled = torch.compile(model, backend="specmoe", options=options)
        alike = [c for c in cases if (c.lowering, c.predicts) == (lowering, predicts)]
        with _no_graph_caches():
            for case in alike:
                if (case.cache, case.batch) in possible:
                    into[case] = generate(compiled, case.cache, case.batch, new_tokens)
        torch._dynamo.reset()


def _run_plain(
    model_class: Any,
    folder: Path,
    cases: Sequence[Case],
    possible: Sequence[tuple[str, int]],
    into: dict[Case, Run],
    new_tokens: int,
) -> None:
    """Generate with a plain model that `model.compile` compiled in place."""
    for case in cases:
        if (case.cache, case.batch) not in possible:
            continue
        model = model_class.from_pretrained(folder / "model").eval()
        model.compile(backend="specmoe", options={"lowering": case.lowering})
        with _no_graph_caches():
            into[case] = generate(model, case.cache, case.batch, new_tokens)
        torch._dynamo.reset()
        del model
        gc.collect()


@contextlib.contextmanager
def _no_graph_caches() -> Iterator[None]:
    """Compile anew: where a cache answers, the passes do not run and report nothing."""
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
