"""`specmoe replay`: a recorded routing under other caches, links and predictors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from specmoe_compile.cli.options import COMPILE_OPTION, DEBUG, JSON, compile_options

if TYPE_CHECKING:
    from specmoe_compile.cli.replay_report import Result
    from specmoe_compile.options import SessionOptions
    from specmoe_compile.replay.engine import RankGroup, ReplaySetting
    from specmoe_compile.replay.summary import Summary, Sweep
    from specmoe_compile.replay.trace import RoutingTrace
    from specmoe_compile.runtime.experts.layout import ExpertLayout


def replay(
    trace: Annotated[
        Path,
        typer.Argument(
            help="A file of specmoe generate --trace.", show_default=False, metavar="TRACE"
        ),
    ],
    expert_cache: Annotated[
        str, typer.Option(help="Cache sizes; 0 is no cache.", metavar="SIZE,SIZE,..")
    ] = "10%,25%,50%",
    policy: Annotated[
        str, typer.Option(help="Who leaves a full cache: lru, lfu, adaptive.", metavar="NAME,..")
    ] = "lru,lfu,adaptive",
    predictor: Annotated[
        str | None,
        typer.Option(
            help="none, recorded (the run's own), perfect, previous (the token before). By default"
            " none, and recorded if there is any.",
            metavar="NAME,..",
            show_default=False,
        ),
    ] = None,
    link_gbps: Annotated[
        float | None,
        typer.Option(
            help="Bandwidth to the experts, 1e9 bytes/s. By default as measured in the trace.",
            show_default=False,
        ),
    ] = None,
    one_read_gbps: Annotated[
        float | None,
        typer.Option(help="Most that one read gets. By default all.", show_default=False),
    ] = None,
    latency_us: Annotated[float, typer.Option(min=0, help="Before a read's first byte.")] = 0.0,
    readers: Annotated[int, typer.Option(min=1, help="Reads in progress at most.")] = 4,
    compute_ms: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Of a decode step, without waiting. By default as measured in the trace.",
            show_default=False,
        ),
    ] = None,
    expert_share: Annotated[
        float, typer.Option(min=0, max=1, help="Part of it that the experts take.")
    ] = 0.5,
    fetched_ms: Annotated[
        float, typer.Option(min=0, help="What an expert that was just read takes longer.")
    ] = 0.0,
    prediction_ms: Annotated[
        float, typer.Option(min=0, help="The host's time to predict one layer.")
    ] = 0.0,
    ranks: Annotated[
        int,
        typer.Option(min=1, help="Share the experts among so many ranks, each with such a link."),
    ] = 1,
    all_reduce_us: Annotated[
        float, typer.Option(min=0, help="What the ranks' sum takes at the end of a layer.")
    ] = 0.0,
    warmup: Annotated[
        int, typer.Option(min=0, help="Decode steps that are replayed and not counted.")
    ] = 4,
    number_format: Annotated[
        Literal["bf16", "float32", "int4", "mxfp4", "nvfp4", "fp8", "int8"] | None,
        typer.Option(
            "--format",
            help="Experts as large as in bf16, float32, int4, mxfp4, nvfp4, fp8 or int8. By default"
            " as recorded.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    option: COMPILE_OPTION = None,
    store_dir: Annotated[
        Path | None,
        typer.Option(help="Refuse a trace of another model than this store's.", show_default=False),
    ] = None,
    json: JSON = None,
    debug: DEBUG = False,
) -> None:
    """Predict hit rates and times from a recorded routing, without the model.

    The trace runs through the runtime's own cache and prefetch code; only the link and computing
    are simulated. Hit rates of a run without prefetch are exactly those of a real run.

    [bold]Examples[/bold]

      specmoe generate ./checkpoint --store disk --prompt "def main():" --trace run.safetensors

      specmoe replay run.safetensors --expert-cache 10%,25%,50%,75% --policy lru,adaptive

      specmoe replay run.safetensors --link-gbps 25 --compute-ms 12 --predictor none,perfect

      specmoe replay run.safetensors --format int4 --link-gbps 25 --compute-ms 12

      specmoe replay run.safetensors --ranks 2 --all-reduce-us 20 --expert-cache 25%
    """
    from specmoe_compile.cli.replay_report import as_dict, print_report
    from specmoe_compile.options import CompileOptions, SessionOptions
    from specmoe_compile.replay.engine import RankGroup
    from specmoe_compile.replay.formats import in_format
    from specmoe_compile.replay.predictors import PREDICTORS
    from specmoe_compile.replay.trace import RoutingTrace
    from specmoe_compile.runtime.cache.eviction import Policy
    from specmoe_compile.system.output import check_writable, write_json

    policies = _names("policy", policy, get_args(Policy))
    predictors = None if predictor is None else _names("predictor", predictor, tuple(PREDICTORS))
    sizes = [size.strip() for size in expert_cache.split(",")]
    speculation = SessionOptions.view(CompileOptions(**compile_options(option)))
    check_writable(json)
    loaded = RoutingTrace.load(trace.expanduser())
    layouts = None if store_dir is None else _store_layouts(loaded, store_dir.expanduser())
    if number_format is not None:
        loaded = in_format(loaded, number_format, layouts)
    sweep, machine = _sweep(
        loaded,
        warmup,
        compute_ms=compute_ms,
        parts={
            "expert_share": expert_share,
            "fetched_ms": fetched_ms,
            "prediction_ms": prediction_ms,
        },
        link={
            "gbps": link_gbps,
            "one_read_gbps": one_read_gbps,
            "latency_us": latency_us,
            "readers": readers,
        },
        ranks=RankGroup(size=ranks, all_reduce_us=all_reduce_us),
    )
    chosen = _chosen_predictors(sweep, predictors)
    settings = [
        (size, _setting(loaded, size, one_policy, name, speculation, ranks))
        for size in sizes
        for one_policy in policies
        for name in chosen
        # Without a cache nobody has to leave it.
        if not (_is_zero(loaded, size) and one_policy != policies[0])
    ]
    result = _run_all(sweep, settings)
    print_report(loaded, machine, result, number_format)
    if json is not None:
        of_format = {"format": number_format, "record_bytes": list(loaded.record_bytes)}
        write_json(json, {**as_dict(loaded, machine, speculation, result), **of_format})


def _names(option: str, text: str, choices: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in choices:
            raise ValueError(f"--{option} {name!r} is not valid: choose {', '.join(choices)}.")
    return names


def _store_layouts(trace: RoutingTrace, folder: Path) -> list[ExpertLayout]:
    """Records of the trace's store; raises `TraceError` if it is another model's."""
    from specmoe_compile.runtime.store.header import read_header

    header = read_header(folder)
    trace.check_model(header.fingerprint, str(folder))
    return [layer.layout for layer in header.layers]


def _is_zero(trace: RoutingTrace, size: str) -> bool:
    from specmoe_compile.system.sizes import parse_size

    return parse_size(size, total_bytes=trace.total_bytes, option="--expert-cache") == 0


def _sweep(
    trace: RoutingTrace,
    warmup: int,
    *,
    compute_ms: float | None,
    parts: dict[str, float],
    link: dict[str, Any],
    ranks: RankGroup,
) -> tuple[Sweep, dict[str, Any]]:
    """The machine as asked for, or as the trace measured it, and its parameters for the reader."""
    from specmoe_compile.replay.engine import ComputeTimes
    from specmoe_compile.replay.link import Link
    from specmoe_compile.replay.measured import measured
    from specmoe_compile.replay.steps import ReplaySteps
    from specmoe_compile.replay.summary import Sweep, counted_steps

    found = measured(trace, counted_steps(trace, warmup))
    from_trace = [
        name
        for name, given in (("link_gbps", link["gbps"]), ("compute_ms", compute_ms))
        if given is None
    ]
    link = {**link, "gbps": found.link_gbps if link["gbps"] is None else link["gbps"]}
    compute_ms = found.compute_ms if compute_ms is None else compute_ms
    for name, value in (("link-gbps", link["gbps"]), ("compute-ms", compute_ms)):
        if value is None:
            raise ValueError(f"The trace measured nothing that gives --{name}: give it.")
    assert compute_ms is not None
    times = ComputeTimes.split(compute_ms, layers=trace.layers, top_k=trace.top_k, **parts)
    sweep = Sweep(ReplaySteps(trace), Link(**link), times, warmup_steps=warmup, ranks=ranks)
    return sweep, {
        "link": link,
        "compute_ms": compute_ms,
        **parts,
        "warmup_steps": warmup,
        "ranks": ranks.size,
        "all_reduce_us": ranks.all_reduce_us,
        "from_trace": from_trace,
        "measured": asdict(found),
    }


def _chosen_predictors(sweep: Sweep, asked: list[str] | None) -> list[str]:
    """Predictors to replay; says so where the trace has no or few predictions."""
    share = sweep.steps.predicted_share(sweep.counted)
    names = asked if asked is not None else ["none", *(["recorded"] if share else [])]
    if "recorded" in names and share == 0:
        raise ValueError(
            "The trace holds no predictions to replay with --predictor recorded: record it with"
            " -O prefetch=true, or choose none, perfect or previous."
        )
    if "recorded" in names and share < 0.99:
        print(
            f"The run predicted {100 * share:.0f} % of its layer steps; elsewhere `recorded` has"
            " none. Record with -O prefetch=true -O auto_off=false to have all.",
            file=sys.stderr,
        )
    return names


def _setting(
    trace: RoutingTrace,
    size: str,
    policy: Any,
    predictor: str,
    speculation: SessionOptions,
    ranks: int,
) -> ReplaySetting:
    from specmoe_compile.replay.engine import ReplaySetting
    from specmoe_compile.system.sizes import parse_size

    if predictor == "recorded":
        # What was predicted so many layers ahead is known so many layers ahead.
        lookahead = int(trace.setting.get("speculation", {}).get("lookahead", 1))
        speculation = replace(speculation, lookahead=lookahead)
    return ReplaySetting(
        # A share is of a rank's own experts, as it is where ranks run.
        cache_bytes=parse_size(
            size, total_bytes=trace.total_bytes // ranks, option="--expert-cache"
        ),
        cache_policy=policy,
        predictor=predictor,
        speculation=speculation,
    )


def _run_all(sweep: Sweep, settings: Sequence[tuple[str, ReplaySetting]]) -> Result:
    from tqdm import tqdm  # type: ignore[import-untyped]

    from specmoe_compile.cli.replay_report import Result

    summaries: list[Summary] = []
    refused: list[dict[str, str]] = []
    sufficient: list[dict[str, Any]] = []
    by_kind = {(s.cache_policy, s.predictor): s for _, s in settings}
    experts = max(sweep.steps.trace.num_experts)
    # The search is a bisection over slots, with one replay more for the whole.
    replays = len(settings) + len(by_kind) * (1 + experts.bit_length())
    with tqdm(total=replays * len(sweep.steps), unit="step", delay=2.0, leave=False) as bar:
        for size, setting in settings:
            try:
                summaries.append(sweep.run(setting, name=size, on_step=bar.update))
            except ValueError as error:
                # A size that a session would refuse, too.
                refused.append({"expert_cache": size, "reason": str(error)})
        if not summaries:
            raise ValueError(refused[0]["reason"])
        for (policy, predictor), setting in by_kind.items():
            slots, size_bytes = sweep.sufficient_bytes(setting, on_step=bar.update)
            sufficient.append(
                {
                    "cache_policy": policy,
                    "predictor": predictor,
                    "slots": slots,
                    "cache_bytes": size_bytes,
                    "share": size_bytes / sweep.steps.trace.total_bytes,
                }
            )
    return Result(summaries=summaries, refused=refused, sufficient=sufficient)
