"""The reference model: a small trained Qwen3-MoE, its tokenizer, its metrics and its widener."""

from pathlib import Path

CHECKPOINT_DIR = Path(__file__).resolve().parent / "checkpoint"
