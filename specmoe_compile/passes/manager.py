"""Run the passes on the aten graph, in one explicit order.

The manager, not the passes, measures time, removes dead code, checks invariants and writes the
trace: `TORCH_LOGS="+specmoe_compile.passes"` logs what matched and why layers were passed over,
`TORCH_TRACE=folder` keeps the graph before and after as artefacts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch._dynamo.utils import dynamo_timed
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._logging._internal import trace_structured
from torch.fx import Graph, GraphModule

from specmoe_compile.passes.check_invariants import check_invariants, output_aliases
from specmoe_compile.passes.choose_predictions import ON_PURPOSE, choose_predictions
from specmoe_compile.passes.find_moe_layers import find_moe_layers
from specmoe_compile.passes.fx_utils import find_calls, module_of, specmoe_ops
from specmoe_compile.passes.guard_speculation import guard_speculation
from specmoe_compile.passes.identity import source_hash
from specmoe_compile.passes.insert_default_vectors import insert_default_vectors
from specmoe_compile.passes.insert_expert_prefetch import insert_expert_prefetch
from specmoe_compile.passes.insert_lookahead_router import insert_lookahead_router
from specmoe_compile.passes.insert_predictor import insert_predictor
from specmoe_compile.passes.mask_foreign_experts import mask_foreign_experts
from specmoe_compile.passes.merge_products import merge_products
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import SpeculationPlan
from specmoe_compile.passes.replace_sums import replace_sums
from specmoe_compile.passes.replace_top_k import replace_top_k
from specmoe_compile.passes.report import PassReport, PipelineReport
from specmoe_compile.passes.share_layers import share_layers
from specmoe_compile.passes.split_expert_execution import split_expert_execution

if TYPE_CHECKING:
    from specmoe_compile.options import CompileOptions

log = logging.getLogger(__name__)

TIME_METRIC = "specmoe_passes"
"""Under which Dynamo's compile-time metrics count the passes."""

Pass = Callable[[Graph, PassConfig, SpeculationPlan], PassReport]

PASSES: tuple[Pass, ...] = (
    find_moe_layers,
    choose_predictions,
    insert_default_vectors,
    insert_lookahead_router,
    insert_predictor,
    insert_expert_prefetch,
    split_expert_execution,
    replace_top_k,
    merge_products,
    replace_sums,
    mask_foreign_experts,
    guard_speculation,
)
"""The passes, in order."""
WITHOUT_PREFETCH: tuple[Pass, ...] = (
    replace_top_k,
    merge_products,
    replace_sums,
    mask_foreign_experts,
)
"""Those that are left where nothing is fetched ahead."""

_PREFETCH_OFF = "option prefetch is off"


def run_passes(
    gm_or_graph: GraphModule | Graph,
    config: PassConfig,
    *,
    check_each: bool | None = None,
    plan: SpeculationPlan | None = None,
) -> PipelineReport:
    """Rewrite an aten graph in place; a second run finds nothing to do.

    Args:
        gm_or_graph: functional aten graph of inference; the caller recompiles a GraphModule.
        config: options.
        check_each: check invariants after every pass and not only at the end; None checks when
            debug logging is on.
        plan: filled in with what the passes found and made, for callers that watch its nodes.

    Returns:
        What was done, and why what was not done.

    Raises:
        InvariantError: a pass broke an invariant: a bug of specmoe.
    """
    with dynamo_timed(TIME_METRIC):
        return _run_timed(gm_or_graph, config, check_each, plan)


def _run_timed(
    gm_or_graph: GraphModule | Graph,
    config: PassConfig,
    check_each: bool | None,
    plan: SpeculationPlan | None,
) -> PipelineReport:
    graph = gm_or_graph.graph if isinstance(gm_or_graph, GraphModule) else gm_or_graph
    started = time.perf_counter()
    report = PipelineReport(nodes_before=len(graph.nodes), nodes_after=len(graph.nodes))
    report.reason = _why_not(graph, config)
    if report.reason in (None, _PREFETCH_OFF):
        debugging = log.isEnabledFor(logging.DEBUG)
        check_each = debugging if check_each is None else check_each
        _run(graph, config, report, SpeculationPlan() if plan is None else plan, check_each)
    report.nodes_after = len(graph.nodes)
    report.elapsed_ms = _ms_since(started)
    log.info("%s", report)
    return report


def _why_not(graph: Graph, config: PassConfig) -> str | None:
    ops = specmoe_ops()
    if next(find_calls(graph, ops.wait_prefetch.default), None) is not None:
        return "it was rewritten before"
    if next(find_calls(graph, ops.experts.default), None) is None:
        return "it dispatches no experts"
    return None if config.predicts else _PREFETCH_OFF


def _run(
    graph: Graph,
    config: PassConfig,
    report: PipelineReport,
    plan: SpeculationPlan,
    check_each: bool,
) -> None:
    _trace("specmoe_before_passes", graph)
    aliases = output_aliases(graph)
    for run in PASSES if config.predicts else WITHOUT_PREFETCH:
        started = time.perf_counter()
        done = run(graph, config, plan)
        done.elapsed_ms = _ms_since(started)
        report.passes.append(done)
        for layer, reason in done.skipped.items():
            log.debug("%s: MoE layer %d: %s", done.name, layer, reason)
        if check_each:
            check_invariants(graph, aliases, complete=run in PASSES[-6:])
    graph.eliminate_dead_code()
    check_invariants(graph, aliases)
    if config.predicts and not any(layer.is_split for layer in plan.layers):
        report.reason = "no MoE layer can be predicted"
        _warn_unless_on_purpose(report)
    _trace("specmoe_after_passes", graph)


def _warn_unless_on_purpose(report: PipelineReport) -> None:
    reasons = [f"layer {n}: {r}" for n, r in report.skipped.items() if r not in ON_PURPOSE]
    if reasons:
        log.warning(
            "specmoe predicts no experts in this graph, so every miss is waited for: %s",
            "; ".join(reasons),
        )


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3


def _trace(name: str, graph: Graph) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: module_of(graph).print_readable(
            print_output=False, include_stride=True, include_device=True
        ),
    )


class SpeculationPass(CustomGraphPass):
    """The passes as Inductor calls them (`post_grad_custom_pre_pass`).

    Attributes:
        config: what the passes are told.
        reports: one per graph that was compiled; empty where the FX graph cache answered.
    """

    def __init__(self, config: PassConfig) -> None:
        self.config = config
        self.reports: list[PipelineReport] = []

    @classmethod
    def from_options(cls, options: CompileOptions, **given: Any) -> SpeculationPass:
        """Build the pass for a compile's options; see `PassConfig.from_options`."""
        return cls(PassConfig.from_options(options, **given))

    def __call__(self, graph: Graph) -> None:
        """Rewrite one graph in place."""
        self.reports.append(run_passes(graph, self.config))

    def uuid(self) -> str:
        """Identity for the FX graph cache: sources of passes and of what they need, and options."""
        return f"specmoe-{source_hash()}-{self.config.key()}"

    def __getstate__(self) -> dict[str, Any]:
        # What was compiled so far is no part of the identity.
        return {"config": self.config, "reports": []}


class SharingPass(CustomGraphPass):
    """`share_layers` as Inductor calls it (`post_grad_custom_post_pass`)."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite one graph in place."""
        report = share_layers(graph)
        log.info("%s: %d", report.name, report.matches)

    def uuid(self) -> str:
        """Identity for the FX graph cache."""
        return f"specmoe-{source_hash()}-shared"
