"""A Hugging Face model as it comes, for arms and for the files that they read."""

from __future__ import annotations

from typing import Any


def load_plain(path: str, dtype: str, **kwargs: Any) -> Any:
    """The Hugging Face model as `from_pretrained` gives it, ready to generate."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    return loader.from_pretrained(path, dtype=dtype, **kwargs).eval()
