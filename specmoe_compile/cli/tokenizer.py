"""The tokenizer of a command's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def quiet_tokenizer(model: str, threads: int | None) -> Any:
    """Set PyTorch's threads, keep transformers' notices away, and load a model's tokenizer."""
    import torch

    from specmoe_compile.system.output import quiet_transformers

    if threads is not None:
        torch.set_num_threads(threads)
    quiet_transformers()
    return load_tokenizer(model)


def load_tokenizer(model: str) -> Any:
    """Load a model's tokenizer; raises `ValueError` with one sentence if there is none."""
    from transformers import AutoTokenizer

    from specmoe_compile.hf.checkpoint import check_checkpoint_folder

    loader: Any = AutoTokenizer
    if Path(model).is_dir():
        check_checkpoint_folder(Path(model))
    elif Path(model).exists():
        raise ValueError(f"{model} is a file: give the checkpoint's folder.")
    none = ValueError(
        f"{model} has no tokenizer that transformers can load: add tokenizer.json and"
        " tokenizer_config.json to the folder."
    )
    try:
        tokenizer = loader.from_pretrained(model)
    except ImportError:
        raise  # says which package is missing
    except Exception as error:  # the tokenizers library raises plain ones
        if isinstance(error, (OSError, ValueError)) and not Path(model).is_dir():
            raise FileNotFoundError(
                f"{model!r} is neither a folder nor a model that the Hugging Face hub or its local"
                " cache has: check the name, or your connection."
            ) from error
        raise none from error
    # From a folder without its files transformers makes one without a vocabulary.
    if not tokenizer("a", add_special_tokens=False).input_ids:
        raise none
    return tokenizer
