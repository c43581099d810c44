"""The reference model: a small trained Qwen3-MoE that comes with the package.

8 layers of 32 experts, 6.79 M parameters in bfloat16. `checkpoint/README.md` says what it learned
from and how well; `benchmarks/reference_model` in the repository trains and measures it.
"""

from pathlib import Path

CHECKPOINT_DIR = Path(__file__).resolve().parent / "checkpoint"
