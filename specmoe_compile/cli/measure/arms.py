"""The ways of running a model that `specmoe bench` compares.

Each arm loads the same checkpoint in its own way and hands back a model whose `generate` is then
timed. Arms without specmoe run Hugging Face as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specmoe_compile.cli.measure.records import ArmJob
from specmoe_compile.errors import SpecMoEError

_NO_PREFETCH: Mapping[str, Any] = {"prefetch": False}


@dataclass(slots=True, kw_only=True)
class LoadedArm:
    """A model ready to generate.

    Attributes:
        model: has `generate`.
        inner: the Hugging Face model itself, behind the compile wrapper if there is one.
        fast_tier_bytes: expert bytes kept in the fast tier.
        read_stats: returns the session's `Stats`; None without a session.
        notes: what a reader must know.
    """

    model: Any
    inner: Any
    fast_tier_bytes: int
    read_stats: Callable[[], Any] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way of running a model.

    Attributes:
        summary: one line for `--help` and for the documents.
        policy: specmoe's policy, None without specmoe.
        capped: whether a memory cap applies; arms that hold every expert in RAM cannot keep one.
        load: loads the model of a job.
        options: of `torch.compile(backend="specmoe")`; None for an arm that is not compiled.
    """

    summary: str
    policy: str | None
    capped: bool
    load: Callable[[ArmJob, Arm], LoadedArm]
    options: Mapping[str, Any] | None = None


def _load_eager(job: ArmJob, arm: Arm) -> LoadedArm:
    model = _hf_from_pretrained(job)
    if _device(job) == "cuda":
        model.to("cuda")
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    return LoadedArm(model=model, inner=model, fast_tier_bytes=experts)


def _load_accelerate(job: ArmJob, arm: Arm) -> LoadedArm:
    """Every decoder layer on disk; what is outside of them on the computing device."""
    _require_accelerate()
    here = "cuda:0" if _device(job) == "cuda" else "cpu"
    device_map = dict.fromkeys(_modules_outside_layers(job.model), here)
    layers = _layer_names(job.model)
    device_map.update(dict.fromkeys(layers, "disk"))
    model = _hf_from_pretrained(job, device_map=device_map, offload_folder=_offload_folder(job))
    return LoadedArm(
        model=model,
        inner=model,
        fast_tier_bytes=0,
        notes=[f"device_map: all {len(layers)} decoder layers on disk, the rest on {here}"],
    )


def _load_accelerate_auto(job: ArmJob, arm: Arm) -> LoadedArm:
    """`device_map="auto"` with as much memory as the expert cache of the other arms."""
    from specmoe_compile.runtime.sizes import parse_size

    _require_accelerate()
    shapes = meta_model(job.model)
    dtype_bytes = _dtype_bytes(job, shapes)
    parameters = {name: p.numel() * dtype_bytes for name, p in shapes.named_parameters()}
    experts = sum(size for name, size in parameters.items() if ".experts." in name)
    cache = parse_size(job.expert_cache, total_bytes=experts)
    here: Any = 0 if _device(job) == "cuda" else "cpu"
    budget = cache + sum(parameters.values()) - experts
    memory: dict[Any, int] = {here: budget}
    if here == 0:
        memory["cpu"] = 0
    model = _hf_from_pretrained(
        job, device_map="auto", max_memory=memory, offload_folder=_offload_folder(job)
    )
    placed = model.hf_device_map
    kept = sum(
        size
        for name, size in parameters.items()
        if ".experts." in name
        and not any(
            where == "disk" and f"{name}.".startswith(f"{module}.")
            for module, where in placed.items()
        )
    )
    on_disk = sum(where == "disk" for where in placed.values())
    return LoadedArm(
        model=model,
        inner=model,
        fast_tier_bytes=kept,
        notes=[
            f"device_map='auto', max_memory={budget} bytes (expert cache + everything else): "
            f"{on_disk} modules on disk"
        ],
    )


def _load_specmoe(job: ArmJob, arm: Arm, expert_cache: str | int, store: str) -> LoadedArm:
    import torch

    import specmoe_compile

    # options that are not valid should fail before minutes of loading
    options = {**(arm.options or {}), **job.options}
    specmoe_compile.CompileOptions.from_kwargs(options)
    inner = specmoe_compile.from_pretrained(
        job.model,
        device=job.device,
        dtype=job.dtype,
        store=job.store or store,  # type: ignore[arg-type]
        expert_cache=expert_cache,
        store_dir=job.store_dir,
        progress=False,
    )
    model: Any = torch.compile(inner, backend="specmoe", options=options)
    stats = specmoe_compile.stats(inner)
    kept = stats.store_bytes if expert_cache == "100%" else stats.fast_tier_bytes
    return LoadedArm(
        model=model,
        inner=inner,
        fast_tier_bytes=kept,
        read_stats=lambda: specmoe_compile.stats(inner),
        notes=[f"store on {stats.store}, {stats.store_bytes} bytes; options {options}"],
    )


def _load_on_demand(job: ArmJob, arm: Arm) -> LoadedArm:
    loaded = _load_specmoe(job, arm, 0, "disk" if _device(job) == "cpu" else "ram")
    loaded.notes.append("no expert cache: every expert is fetched for every token")
    return loaded


def _load_cache(job: ArmJob, arm: Arm) -> LoadedArm:
    return _load_specmoe(job, arm, job.expert_cache, "disk" if _device(job) == "cpu" else "ram")


def _load_resident(job: ArmJob, arm: Arm) -> LoadedArm:
    return _load_specmoe(job, arm, "100%", "ram")


ARMS: Mapping[str, Arm] = {
    "eager": Arm(
        summary="Hugging Face, unmodified, all experts in memory: the reference for tokens",
        policy=None,
        capped=False,
        load=_load_eager,
    ),
    "accelerate": Arm(
        summary="Hugging Face device_map disk offload, untouched, every decoder layer on disk",
        policy=None,
        capped=True,
        load=_load_accelerate,
    ),
    "accelerate_auto": Arm(
        summary="the same with device_map='auto' and as much memory as the expert cache",
        policy=None,
        capped=True,
        load=_load_accelerate_auto,
    ),
    "on_demand": Arm(
        summary="specmoe without an expert cache: every expert is fetched when it is needed",
        policy="exact",
        capped=True,
        load=_load_on_demand,
        options=_NO_PREFETCH,
    ),
    "cache": Arm(
        summary="specmoe with an expert cache (--expert-cache), no speculation",
        policy="exact",
        capped=True,
        load=_load_cache,
        options=_NO_PREFETCH,
    ),
    "prefetch": Arm(
        summary="on_demand and prefetch: no cache beyond the buffers of two layers",
        policy="exact",
        capped=True,
        load=_load_on_demand,
        options={},
    ),
    "specmoe": Arm(
        summary="specmoe as it comes: expert cache and prefetch, exact",
        policy="exact",
        capped=True,
        load=_load_cache,
        options={},
    ),
    "default_vector": Arm(
        summary="the same; a light expert that is missing gets its default vector (approximate)",
        policy="default_vector",
        capped=True,
        load=_load_cache,
        options={"policy": "default_vector"},
    ),
    "commit": Arm(
        summary="the same; predicted experts are executed, never corrected (approximate)",
        policy="commit",
        capped=True,
        load=_load_cache,
        options={"policy": "commit"},
    ),
    "resident": Arm(
        summary="specmoe with all experts in memory",
        policy="exact",
        capped=False,
        load=_load_resident,
        options=_NO_PREFETCH,
    ),
}


def checked_arms(names: str) -> list[str]:
    """Split a comma-separated list of arms; raises `ValueError` naming the valid ones."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise ValueError(f"--arms names no arm: choose from {', '.join(ARMS)}.")
    for name in wanted:
        if name not in ARMS:
            raise ValueError(f"There is no arm {name!r}: choose from {', '.join(ARMS)}.")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"--arms={names!r} names an arm twice.")
    return wanted


def _device(job: ArmJob) -> str:
    import torch

    if job.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(job.device).type


def _hf_from_pretrained(job: ArmJob, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    return loader.from_pretrained(job.model, dtype=job.dtype, **kwargs).eval()


def meta_model(path: str) -> Any:
    """The model's modules without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    maker: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return maker.from_config(AutoConfig.from_pretrained(path))


def _dtype_bytes(job: ArmJob, shapes: Any) -> int:
    import torch

    dtype = shapes.config.dtype if job.dtype == "auto" else getattr(torch, job.dtype)
    return (dtype or torch.float32).itemsize


def _layer_names(path: str) -> list[str]:
    """Module paths of the decoder layers: those that hold the experts."""
    model = meta_model(path)
    for name, module in model.named_modules():
        if name.endswith(".layers") and any(".experts." in p for p, _ in module.named_parameters()):
            return [f"{name}.{index}" for index in range(len(module))]
    raise SpecMoEError(f"{type(model).__name__} has no decoder layers with experts.")


def _modules_outside_layers(path: str) -> list[str]:
    """Module paths that cover what is not in a decoder layer, coarsest first."""
    layers = _layer_names(path)
    parent = layers[0].rpartition(".")[0]
    outside: list[str] = []

    def visit(module: Any, name: str) -> None:
        for child_name, child in module.named_children():
            path_of_child = f"{name}.{child_name}" if name else child_name
            if path_of_child == parent:
                continue
            if parent.startswith(f"{path_of_child}."):
                visit(child, path_of_child)
            else:
                outside.append(path_of_child)

    visit(meta_model(path), "")
    return outside


def _offload_folder(job: ArmJob) -> str:
    folder = Path(job.work_dir) / "accelerate"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def _require_accelerate() -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise SpecMoEError(
            "The arms accelerate and accelerate_auto need the package accelerate: run"
            " pip install 'specmoe-compile[bench]', or leave them out of --arms."
        ) from error
