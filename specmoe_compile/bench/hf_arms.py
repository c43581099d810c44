"""Arms that are Hugging Face as it comes, without specmoe: in memory, and offloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specmoe_compile.bench.arm import Arm, LoadedArm
from specmoe_compile.bench.peer_files import peer_file
from specmoe_compile.bench.plain_model import load_plain
from specmoe_compile.bench.records import ArmJob
from specmoe_compile.errors import SpecMoEError


def load_eager(job: ArmJob, arm: Arm) -> LoadedArm:
    model = load_plain(job.model, job.dtype)
    if device_of(job) == "cuda":
        model.to("cuda")
    return LoadedArm(model=model, inner=model, fast_tier_bytes=_expert_bytes(model))


def load_eager_loop(job: ArmJob, arm: Arm) -> LoadedArm:
    model = load_plain(job.model, job.dtype, experts_implementation="eager")
    if device_of(job) == "cuda":
        model.to("cuda")
    return LoadedArm(model=model, inner=model, fast_tier_bytes=_expert_bytes(model))


def _expert_bytes(model: Any) -> int:
    return sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)


def load_accelerate(job: ArmJob, arm: Arm) -> LoadedArm:
    """Every decoder layer on disk; what is outside of them on the computing device."""
    _require_accelerate()
    here = "cuda:0" if device_of(job) == "cuda" else "cpu"
    device_map = dict.fromkeys(_modules_outside_layers(job.model), here)
    layers = _layer_names(job.model)
    device_map.update(dict.fromkeys(layers, "disk"))
    model = load_plain(
        job.model, job.dtype, device_map=device_map, offload_folder=_offload_folder(job)
    )
    return LoadedArm(
        model=model,
        inner=model,
        fast_tier_bytes=0,
        notes=[f"device_map: all {len(layers)} decoder layers on disk, the rest on {here}"],
    )


def load_accelerate_cpu(job: ArmJob, arm: Arm) -> LoadedArm:
    """Every decoder layer in RAM; what is outside of them on the computing device."""
    _require_accelerate()
    here = "cuda:0" if device_of(job) == "cuda" else "cpu"
    device_map = dict.fromkeys(_modules_outside_layers(job.model), here)
    layers = _layer_names(job.model)
    device_map.update(dict.fromkeys(layers, "cpu"))
    model = load_plain(job.model, job.dtype, device_map=device_map)
    return LoadedArm(
        model=model,
        inner=model,
        fast_tier_bytes=0 if here != "cpu" else _expert_bytes(model),
        notes=[f"device_map: all {len(layers)} decoder layers on cpu, the rest on {here}"],
    )


def load_mmap(job: ArmJob, arm: Arm) -> LoadedArm:
    """The unmodified model, every parameter mapped from a file: the page cache is its cache."""
    _require_accelerate()
    from accelerate import init_empty_weights
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if device_of(job) != "cpu":
        raise ValueError("The arm mmap computes on the CPU: give --device cpu, or leave it out.")
    path = Path(job.peer_file) if job.peer_file is not None else peer_file(job)
    maker: Any = AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model = maker.from_config(AutoConfig.from_pretrained(job.model)).eval()
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    absent = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if absent:
        raise SpecMoEError(f"{path.name} lacks {absent[0]}: delete the file, it is made again")
    if (Path(job.model) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(job.model)
    model.requires_grad_(False)
    return LoadedArm(
        model=model,
        inner=model,
        fast_tier_bytes=None,
        notes=[f"all parameters mapped from one file of {path.stat().st_size} bytes"],
    )


def load_accelerate_auto(job: ArmJob, arm: Arm) -> LoadedArm:
    """`device_map="auto"` with as much memory as the expert cache of the other arms."""
    from specmoe_compile.system.sizes import parse_size

    _require_accelerate()
    shapes = meta_model(job.model)
    dtype_bytes = _dtype_bytes(job, shapes)
    parameters = {name: p.numel() * dtype_bytes for name, p in shapes.named_parameters()}
    experts = sum(size for name, size in parameters.items() if ".experts." in name)
    cache = parse_size(job.expert_cache, total_bytes=experts)
    here: Any = 0 if device_of(job) == "cuda" else "cpu"
    budget = cache + sum(parameters.values()) - experts
    memory: dict[Any, int] = {here: budget}
    if here == 0:
        memory["cpu"] = 0
    model = load_plain(
        job.model,
        job.dtype,
        device_map="auto",
        max_memory=memory,
        offload_folder=_offload_folder(job),
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


def device_of(job: ArmJob) -> str:
    import torch

    if job.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(job.device).type


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
            "The arms accelerate, accelerate_auto, accelerate_cpu and mmap need the package"
            " accelerate: run pip install 'specmoe-compile[bench]', or leave them out of --arms."
        ) from error
