"""Write the reference model with expert records of a chosen size, and prove its tokens the same.

python -m benchmarks widen OUT --record-mib 3 --dtype float32
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, AutoTokenizer

from specmoe_compile.reference_model import CHECKPOINT_DIR
from specmoe_compile.reference_model.widen import DTYPES, MIB, widen

VERIFY_PROMPTS = (
    "def main(argv):\n",
    "import os\nimport sys\n\nclass ",
    "    for name, value in sorted(",
    '"""Parse a file and return',
)
VERIFY_TOKENS = 32


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
        prog="python -m benchmarks widen", description=(widen.__doc__ or "").split("\n")[0]
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
