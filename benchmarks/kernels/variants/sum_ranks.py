"""The launch of `sum_ranks` for a model's hidden state, of two ranks.

Shape letters: H hidden, W words of 4 bytes.
"""

from __future__ import annotations

from benchmarks.kernels.compile_spec import CompileSpec, ModelShape
from specmoe_compile.kernels.sum_ranks.inbox import BLOCK_WORDS, SHELF_LETTERS
from specmoe_compile.kernels.sum_ranks.kernel import DTYPES, sum_ranks_kernel

NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def compile_specs(shape: ModelShape) -> list[CompileSpec]:
    """One token's hidden state, on the second of two ranks; bound by the way over the link."""
    pointers = ("x", "out", "addresses", "sums")
    words = shape.hidden * shape.itemsize // 4
    return [
        CompileSpec(
            kernel=sum_ranks_kernel,
            signature={
                **dict.fromkeys(("x", "out", "sums"), "*i32"),
                "addresses": "*i64",
                "words": "i32",
            },
            constexprs={
                "RANK": 1,
                "RANKS": 2,
                "HALVES": shape.dtype != "fp32",
                "DTYPE": DTYPES[NAMES[shape.dtype]],
                "SHELF": SHELF_LETTERS,
                "BLOCK": BLOCK_WORDS,
            },
            num_warps=1,
            num_stages=1,
            grid=(-(-words // BLOCK_WORDS),),
            label="sum_ranks T=1 N=2",
            aligned=(*pointers, "words"),
            traffic=None,
        )
    ]
