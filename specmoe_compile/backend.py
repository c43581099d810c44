"""The `torch.compile` backend: options, passes, lowering, and the only fallback.

    Dynamo graph -> outline_experts, read_filled_cache -> AOTAutograd
        -> passes on the aten graph -> Inductor

A graph that holds no expert dispatch is lowered untouched, with one warning that says why;
`strict=True` raises instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule
from torch.nn import functional

from specmoe_compile.errors import CalibrationError, CompileError
from specmoe_compile.options import MAX_DECODE_TOKENS, CompileOptions, SessionOptions
from specmoe_compile.passes.choose_capture import made_results, why_not_captured_or_none
from specmoe_compile.passes.outline_experts import find_dispatch_nodes, outline_experts
from specmoe_compile.passes.read_filled_cache import read_filled_cache
from specmoe_compile.passes.replace_sums import rank_groups
from specmoe_compile.runtime.cpu.live_engine import LiveModules
from specmoe_compile.runtime.cpu.one_thread import on_one_thread
from specmoe_compile.system.captured import Compiled, keeping_results, telling_of_capture
from specmoe_compile.system.compilers import check_compiler
from specmoe_compile.system.early_kernels import kernels_compiled_early
from specmoe_compile.system.graph_runs import counted
from specmoe_compile.system.inductor import cpu_settings
from specmoe_compile.system.machine import available_ram_bytes
from specmoe_compile.system.progress import phase
from specmoe_compile.system.quick_links import kernels_linked_quickly
from specmoe_compile.system.sizes import format_bytes
from specmoe_compile.system.traced_effects import leaves_objects_alone

if TYPE_CHECKING:
    from specmoe_compile.passes.manager import SpeculationPass
    from specmoe_compile.runtime.session import Session

log = logging.getLogger(__name__)


def specmoe(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Compile one Dynamo graph; the function that `backend="specmoe"` names.

    Args:
        gm: graph from Dynamo.
        example_inputs: its inputs.
        options: fields of `CompileOptions` by name.
        mode: `torch.compile`'s mode; `reduce-overhead` means CUDA graphs.

    Returns:
        A callable with the graph's signature.

    Raises:
        ValueError: an unknown option, or a value that is not valid.
        CompileError: the graph trains; or, with `strict=True`, it cannot be rewritten.
    """
    config = CompileOptions.from_kwargs(options, mode)
    with phase(f"compiling {_step_name(gm)}"):
        is_all = leaves_objects_alone()
        return counted(_compile(gm, example_inputs, config), is_all=is_all)


def _compile(gm: GraphModule, example_inputs: Sequence[Any], config: CompileOptions) -> Compiled:
    report = outline_experts(gm, LiveModules())
    for reason in report.skipped:
        log.info("outline_experts: %s", reason)
    dispatch = find_dispatch_nodes(gm.graph)
    if not dispatch:
        _fall_back(config, report.skipped or ["it calls no experts module"])
        return _lower_untouched(gm, example_inputs, config)
    _refuse_training(example_inputs)
    if config.attention:
        _read_filled_cache(gm)
    speculation = _configure_speculation(gm, config)
    return _lower(gm, example_inputs, config, speculation)


def _read_filled_cache(gm: GraphModule) -> None:
    """Rewrite attention, on a CPU where the C++ engine computes it."""
    on_cpu = all(s.device.type == "cpu" and s.engine.multiplies for s in _sessions_of(gm))
    report = read_filled_cache(gm, device_types=("cpu",) if on_cpu else ("cuda",))
    for reason in report.skipped:
        log.info("read_filled_cache: %s", reason)


def _engine_attends(gm: GraphModule) -> bool:
    """Whether PyTorch computes no attention of a Dynamo graph whose attention was rewritten."""
    called = {node.target for node in gm.graph.nodes if node.op == "call_function"}
    ours = torch.ops.specmoe_kernels.decode_attention.default
    return ours in called and functional.scaled_dot_product_attention not in called


def _refuse_training(example_inputs: Sequence[Any]) -> None:
    if not torch.is_grad_enabled():
        return
    if any(isinstance(t, torch.Tensor) and t.requires_grad for t in example_inputs):
        raise CompileError(
            "specmoe compiles for inference only, and this graph has parameters or inputs that"
            " require gradients: run it under torch.no_grad(), or call"
            " model.requires_grad_(False) first"
        )


def _fall_back(config: CompileOptions, reasons: Sequence[str]) -> None:
    message = "specmoe leaves this graph to Inductor untouched: " + "; ".join(
        dict.fromkeys(reasons)
    )
    if config.strict:
        raise CompileError(
            message + ". strict=True forbids this: use a Mixture-of-Experts model or strict=False"
        )
    _warn_once(message)


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        log.warning("%s", message)


def _configure_speculation(gm: GraphModule, config: CompileOptions) -> SpeculationPass:
    """Hand the options to the graph's sessions; returns the passes."""
    from specmoe_compile.passes.manager import SpeculationPass

    sessions = _sessions_of(gm)
    # Nothing to prefetch where all experts are: a plain model, or a store that is computed from.
    fetching = [session for session in sessions if session.engine.fetches]
    offloaded = len(fetching) == len(sessions)
    config = _with_prefetch_decided(fetching or sessions, config)
    if fetching and not offloaded and config.predicts:
        _warn_once(
            "specmoe predicts no experts in a graph of several models, of which only"
            f" {len(fetching)} of {len(sessions)} fetch experts: compile each model by itself"
        )
    network_layers: tuple[int, ...] = ()
    if config.default_vectors is not None and offloaded:
        config, network_layers = _calibrated(sessions, config, config.default_vectors)
    for session in sessions:
        session.configure(SessionOptions.view(config))
    return SpeculationPass.from_options(
        config,
        offloaded=offloaded,
        conditional=all(session.engine.plans_steps for session in sessions),
        multiplies=all(session.engine.multiplies for session in sessions),
        network_layers=network_layers,
        resident_layers=_resident_layers(sessions),
        foreign_ids=_foreign_ids(sessions),
        inbox_groups=_inbox_groups(gm, sessions[0].device, config),
    )


def _foreign_ids(sessions: Sequence[Session]) -> tuple[tuple[int, int], ...]:
    """Resident layers of a rank, and the id of others' experts; of the only model in a graph."""
    return tuple(sorted(sessions[0].engine.foreign_ids.items())) if len(sessions) == 1 else ()


def _inbox_groups(gm: GraphModule, device: torch.device, config: CompileOptions) -> tuple[str, ...]:
    """Process groups whose ranks add up in one shot; says why of those that were to and cannot."""
    groups = () if config.one_shot_ranks == 0 else rank_groups(gm, config.one_shot_bytes)
    if not groups:
        return ()
    from specmoe_compile.runtime.cuda.inboxes import open_inboxes

    reasons = open_inboxes(groups, device, config.one_shot_ranks)
    for group, reason in reasons.items():
        if reason is None:
            log.info("ranks of process group %s add up in one shot, in each other's memory", group)
        else:
            tell = _warn_once if config.sums == "one_shot" else log.info
            tell(f"ranks of process group {group} add up by all-reduce, not in one shot: {reason}")
    return tuple(group for group, reason in reasons.items() if reason is None)


def _with_prefetch_decided(sessions: Sequence[Session], config: CompileOptions) -> CompileOptions:
    """Resolve `prefetch="auto"`, and say so where nothing will be predicted."""
    from specmoe_compile.runtime.engine import with_prefetch_decided

    decided = with_prefetch_decided(config, [session.engine for session in sessions])
    if config.prefetch == "auto" and not decided.prefetch:
        log.info(
            'prefetch="auto" predicts no experts in this graph: %s; prefetch=True predicts anyway',
            "on a CPU with an expert cache steps are faster without predictions"
            if sessions[0].device.type == "cpu"
            else "the cache has slots for half of the experts or more, and misses too seldom on a"
            " GPU for predictions to pay",
        )
    return decided


def _resident_layers(sessions: Sequence[Session]) -> tuple[int, ...]:
    """MoE layers of which no expert is ever missing, in whichever session."""
    each = [session.engine.resident_layers for session in sessions]
    return tuple(sorted(each[0].intersection(*each)))


def _sessions_of(gm: GraphModule) -> list[Session]:
    from specmoe_compile.runtime.session import get_session

    handles = dict.fromkeys(node.args[3] for node in find_dispatch_nodes(gm.graph))
    return [get_session(handle) for handle in handles]  # type: ignore[arg-type]


def _calibrated(
    sessions: Sequence[Session], config: CompileOptions, path: str
) -> tuple[CompileOptions, tuple[int, ...]]:
    """Give sessions what a calibration file holds.

    Returns:
        The options with what the file decides of them, and the layers that networks predict.

    Raises:
        CalibrationError: the file cannot be read, or belongs to another model.
        CompileError: it belongs to one of several models in the graph.
    """
    from specmoe_compile.calibrate.calibration import Calibration, use_networks

    calibration = Calibration.load(path)
    others: list[CalibrationError] = []
    for session in sessions:
        try:
            calibration.check(session, path=path)
        except CalibrationError as error:
            others.append(error)
    if others and len(others) == len(sessions):
        raise others[0]
    if others:
        raise CompileError(
            f"one graph runs the experts of {len(sessions)} models, and default_vectors={path!r}"
            f" is not of {len(others)} of them: compile each model by itself, with its own file"
        )
    predictor = calibration.resolved(config.predictor, lookahead=config.lookahead)
    for session in sessions:
        session.default_vectors.load(calibration.default_vectors)
        use_networks(session, calibration, predictor)
    skip_layers = config.skip_layers
    if skip_layers == "auto":
        skip_layers = calibration.poor_layers(config.policy, predictor)
    config = replace(config, predictor=predictor, skip_layers=skip_layers)
    return config, calibration.network_layers(predictor)


def _lower(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    config: CompileOptions,
    speculation: SpeculationPass,
) -> Compiled:
    if config.lowering == "eager":
        return _lower_eager(gm, example_inputs, speculation)
    if not config.compile_prefill and _is_prefill(gm):
        # Bound by large products and by reading experts, and compiled as long as decode.
        return gm.forward
    _check_compiler(example_inputs)
    _check_room(_sessions_of(gm))
    on_gpu = _on_gpu(example_inputs)
    patches: dict[str, Any] = {
        "post_grad_custom_pre_pass": speculation,
        "freezing": False,
        **({} if on_gpu else cpu_settings()),
    }
    shares_layers = on_gpu if config.share_layers == "auto" else config.share_layers
    if shares_layers:
        from specmoe_compile.passes.manager import SharingPass

        patches["post_grad_custom_post_pass"] = SharingPass()
    compiled = _lower_with_inductor(gm, example_inputs, config, patches)
    multiplies = config.products and speculation.config.multiplies
    if on_gpu or not multiplies:
        return compiled
    return on_one_thread(compiled, example_inputs, attends=_engine_attends(gm))


def _lower_with_inductor(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    config: CompileOptions,
    patches: Mapping[str, Any],
) -> Compiled:
    from torch._inductor.compile_fx import compile_fx

    captures = _captures(gm, config)
    patches = {**patches, "triton.cudagraphs": True} if captures else dict(patches)
    with kernels_compiled_early(), kernels_linked_quickly():
        compiled: Compiled = compile_fx(gm, list(example_inputs), config_patches=patches)  # type: ignore[assignment]
    if not captures:
        return compiled
    return keeping_results(telling_of_capture(compiled, _step_name(gm)), made_results(gm))


def _check_compiler(example_inputs: Sequence[Any]) -> None:
    """Raise `CompileError`, one sentence, instead of what Inductor says without a compiler."""
    try:
        check_compiler("cuda" if _on_gpu(example_inputs) else "cpu")
    except FileNotFoundError as error:
        raise CompileError(str(error)) from error


def _on_gpu(example_inputs: Sequence[Any]) -> bool:
    return any(isinstance(t, torch.Tensor) and t.is_cuda for t in example_inputs)


def _check_room(sessions: Sequence[Session]) -> None:
    """Raise `CompileError` where the system would end the process as it compiles."""
    wanted = max(session.compiling_bytes for session in sessions)
    free = available_ram_bytes() if wanted else 0
    if free < wanted:
        raise CompileError(
            f"Compiling takes about {format_bytes(wanted)} of RAM, {format_bytes(free)} are free."
            " Free some RAM, raise the memory limit, run without torch.compile (--no-compile), or"
            " try it all the same with store='disk'."
        )


def _step_name(gm: GraphModule) -> str:
    """What a graph computes, in a word for people."""
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        if "input_ids" in node.name and isinstance(value, torch.Tensor) and value.dim() == 2:
            return "decode" if value.shape[1] == 1 else "prefill"
    return "a part of the model"


def _captures(gm: GraphModule, config: CompileOptions) -> bool:
    """Whether the graph becomes a CUDA graph."""
    if config.mode != "reduce-overhead":
        return False
    reason = why_not_captured_or_none(gm)
    if reason is not None:
        log.info("no CUDA graph for this step: %s", reason)
    return reason is None


def _is_prefill(gm: GraphModule) -> bool:
    """Whether the graph was traced for steps longer than decode; of an open number, by its hint."""
    nodes: list[Any] = find_dispatch_nodes(gm.graph)
    steps = [node.args[1].meta["example_value"].shape[0] for node in nodes]
    hints = [tokens if isinstance(tokens, int) else tokens.node.hint for tokens in steps]
    return all(hint is not None and hint > MAX_DECODE_TOKENS for hint in hints)


def _lower_untouched(
    gm: GraphModule, example_inputs: Sequence[Any], config: CompileOptions
) -> Compiled:
    if config.lowering == "eager":
        return gm.forward
    return _lower_with_inductor(gm, example_inputs, config, {})


def _lower_eager(
    gm: GraphModule, example_inputs: Sequence[Any], speculation: Callable[[Any], None]
) -> Compiled:
    """Run the rewritten aten graph node by node, with no code generation."""
    from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
    from torch._dynamo.backends.common import aot_autograd

    def compile_forward(graph_module: GraphModule, inputs: Sequence[Any]) -> Compiled:
        speculation(graph_module.graph)
        graph_module.recompile()
        return make_boxed_func(graph_module.forward)  # type: ignore[no-any-return]

    return aot_autograd(fw_compiler=compile_forward)(gm, list(example_inputs))
