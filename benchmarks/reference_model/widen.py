"""Write the reference model with expert records of a chosen size, its function unchanged.

    python -m benchmarks widen OUT --record-mib 3 --dtype float32

Each FFN neuron of each expert becomes c copies: its gate and up rows are repeated and its down
column is repeated and divided by c. With c a power of two the division is exact, so the sums differ
from the source's in nothing but their order.

Shapes: E experts, H hidden, I expert intermediate; one expert holds 3 * H * I weights.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.reference_model import CHECKPOINT_DIR

MIB = 2**20
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
EXPERT_WEIGHT = re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|down_proj)\.weight$")
COPIED_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
VERIFY_PROMPTS = (
    "def main(argv):\n",
    "import os\nimport sys\n\nclass ",
    "    for name, value in sorted(",
    '"""Parse a file and return',
)
VERIFY_TOKENS = 32


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
            handle = safe_open(folder / name, framework="pt")
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
        return self._owner[name].get_tensor(name)


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
            f"an expert record of {record_bytes} bytes is not possible in "
            f"{str(dtype).removeprefix('torch.')}: choose {smallest} bytes times a power of two"
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


def _greedy_tokens(folder: Path, prompts: tuple[str, ...], tokens: int) -> Iterator[list[int]]:
    """Yield the greedy continuation of each prompt, computed in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt in tqdm(prompts, desc=f"verify {folder.name}", unit="prompt", file=sys.stderr):
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        yield output[0, inputs["input_ids"].shape[1] :].tolist()


def count_different_tokens(
    src: Path, dst: Path, prompts: tuple[str, ...] = VERIFY_PROMPTS, tokens: int = VERIFY_TOKENS
) -> int:
    """Count the greedy tokens, in float32, in which two checkpoints differ."""
    # One model in memory at a time: the lists are complete before the other one is loaded.
    expected = list(_greedy_tokens(src, prompts, tokens))
    got = list(_greedy_tokens(dst, prompts, tokens))
    pairs = zip(expected, got, strict=True)
    return sum(a != b for left, right in pairs for a, b in zip(left, right, strict=True))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks widen", description=widen.__doc__.split("\n")[0]
    )
    parser.add_argument("out", type=Path, help="new folder of the widened checkpoint")
    parser.add_argument("--source", type=Path, default=CHECKPOINT_DIR, help="checkpoint to widen")
    parser.add_argument("--record-mib", type=float, default=3.0, help="size of one expert in MiB")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--shard-mib", type=float, default=128.0, help="largest file in MiB")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prove the same greedy tokens in float32 (needs the widened model in RAM)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Widen a checkpoint; return the exit code: 0, 1 when tokens differ, 2 for bad input."""
    args = parse_arguments(argv)
    dtype = DTYPES[args.dtype]
    try:
        copies = widen(
            args.source,
            args.out,
            round(args.record_mib * MIB),
            dtype,
            round(args.shard_mib * MIB),
            progress=True,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {copies} copies of each neuron, {args.record_mib:g} MiB per expert")
    if not args.verify:
        return 0
    total = len(VERIFY_PROMPTS) * VERIFY_TOKENS
    different = count_different_tokens(args.source, args.out)
    print(f"{total - different} of {total} greedy tokens equal to the source's in float32")
    return 1 if different else 0
