"""Writes a checkpoint with expert records of a chosen size, its function unchanged.

Each FFN neuron of each expert becomes c copies: its gate and up rows are repeated and its down
column is repeated and divided by c. With c a power of two the division is exact, so the sums differ
from the source's in nothing but their order.

Shapes: E experts, H hidden, I expert intermediate; one expert holds 3 * H * I weights.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm  # type: ignore[import-untyped]

MIB = 2**20
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
EXPERT_WEIGHT = re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|down_proj)\.weight$")
COPIED_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")


class WeightFiles:
    """Read access to the tensors of a checkpoint folder, sharded or not, one at a time."""

    def __init__(self, folder: Path):
        """Index the folder's safetensors files.

        Raises:
            ValueError: there are none, or the index names one that is missing.
        """
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} has no {missing[0]}: it is not a safetensors checkpoint")
        self._owner: dict[str, Any] = {}
        for name in files:
            handle: Any = safe_open(folder / name, framework="pt")
            self._owner.update(dict.fromkeys(handle.keys(), handle))

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._owner)

    def shape(self, name: str) -> list[int]:
        """Return a tensor's shape without reading it."""
        return list(self._owner[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return a tensor's safetensors dtype name, such as BF16, without reading it."""
        return str(self._owner[name].get_slice(name).get_dtype())

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU."""
        tensor: torch.Tensor = self._owner[name].get_tensor(name)
        return tensor


def copies_for(record_bytes: int, hidden: int, intermediate: int, dtype: torch.dtype) -> int:
    """Return c, the number of copies of each neuron that gives records of this size.

    Args:
        record_bytes: wanted size of one expert in bytes.
        hidden, intermediate: H and I of the source. dtype: of the widened weights.

    Raises:
        ValueError: the size is not the source's record times a power of two.
    """
    smallest = 3 * hidden * intermediate * dtype.itemsize
    copies, rest = divmod(record_bytes, smallest)
    if rest or copies < 1 or copies & (copies - 1):
        raise ValueError(
            f"experts of {record_bytes / MIB:g} MiB are not possible in"
            f" {str(dtype).removeprefix('torch.')}: give {smallest / MIB:g} times a power of two,"
            f" such as {16 * smallest / MIB:g} or {32 * smallest / MIB:g}"
        )
    return copies


def widen_tensor(name: str, tensor: torch.Tensor, copies: int) -> torch.Tensor:
    """Return an expert's weight with each neuron in `copies` copies; others as they are.

    gate and up: [I, H] -> [c * I, H]. down: [H, I] -> [H, c * I], divided by c.
    """
    match = EXPERT_WEIGHT.search(name)
    if match is None:
        return tensor
    if match.group(1) == "down_proj":
        return tensor.repeat_interleave(copies, dim=1).div_(copies)
    return tensor.repeat_interleave(copies, dim=0)


def _plan_shards(
    weights: WeightFiles, copies: int, dtype: torch.dtype, shard_bytes: int
) -> list[list[tuple[str, int]]]:
    """Group (tensor name, widened bytes) into shards of at most `shard_bytes`, or one tensor."""
    shards: list[list[tuple[str, int]]] = [[]]
    used = 0
    for name in weights.names:
        size = dtype.itemsize * (copies if EXPERT_WEIGHT.search(name) else 1)
        for extent in weights.shape(name):
            size *= extent
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((name, size))
        used += size
    return shards


def _read_source(src: Path, dtype: torch.dtype) -> tuple[dict[str, Any], WeightFiles]:
    """Return configuration and weights of the source, or say why it cannot be widened."""
    if not (src / "config.json").is_file():
        raise ValueError(f"{src} has no config.json: it is not a checkpoint folder")
    config = json.loads((src / "config.json").read_text())
    weights = WeightFiles(src)
    experts = [name for name in weights.names if EXPERT_WEIGHT.search(name)]
    if not experts or "moe_intermediate_size" not in config:
        raise ValueError(f"{src} has no per-expert gate, up and down projections to widen")
    if dtype == torch.bfloat16 and weights.dtype(experts[0]) != "BF16":
        raise ValueError(f"{src} is stored in {weights.dtype(experts[0])}: bfloat16 would round it")
    return config, weights


def _write_shards(
    weights: WeightFiles,
    shards: list[list[tuple[str, int]]],
    copies: int,
    dtype: torch.dtype,
    out: Path,
    progress: bool,
) -> None:
    """Write the shards and their index, one shard in memory at a time."""
    total = sum(size for shard in shards for _, size in shard)
    weight_map = {}
    with tqdm(
        total=total,
        desc="widen",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not progress,
    ) as bar:
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name, size in shard:
                widened = widen_tensor(name, weights.read(name).to(dtype), copies)
                tensors[name] = widened.contiguous()
                weight_map[name] = file
                bar.update(size)
            save_file(tensors, out / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def widen(
    src: Path,
    dst: Path,
    record_bytes: int = 3 * MIB,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = 128 * MIB,
    *,
    progress: bool = False,
) -> int:
    """Write a function-preserving copy of `src` whose experts have `record_bytes` bytes each.

    Memory is bounded by one shard. Everything is written to `dst` + ".tmp" and then renamed.

    Args:
        src: checkpoint folder with per-expert tensors. dst: new folder.
        record_bytes: size of one expert in bytes. dtype: bfloat16 or float32, of all weights.
        shard_bytes: largest size of one safetensors file. progress: show a progress bar.

    Returns:
        c, the number of copies of each neuron.

    Raises:
        ValueError: impossible record size, unsuitable source, `dst` exists, or no room on disk.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype {dtype} is not supported: choose bfloat16 or float32")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes}: it must be positive")
    config, weights = _read_source(src, dtype)
    intermediate = config["moe_intermediate_size"]
    copies = copies_for(record_bytes, config["hidden_size"], intermediate, dtype)
    if dst.exists():
        raise ValueError(f"{dst} exists already: name a new folder or remove it")
    shards = _plan_shards(weights, copies, dtype, shard_bytes)
    needed = sum(size for shard in shards for _, size in shard)
    dst.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(dst.parent).free
    if free < needed:
        raise ValueError(f"{dst.parent} has {free} bytes free: the widened model needs {needed}")
    temporary = dst.with_name(dst.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_shards(weights, shards, copies, dtype, temporary, progress)
        config |= {
            "moe_intermediate_size": intermediate * copies,
            "dtype": str(dtype).removeprefix("torch."),
        }
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in COPIED_FILES:
            if (src / name).is_file():
                shutil.copyfile(src / name, temporary / name)
        temporary.rename(dst)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return copies
