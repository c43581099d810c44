"""Which format a checkpoint is in, by its `quantization_config`, and which of its tensors belong
together.

A new format is a file beside this one and a row of `_FORMATS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specmoe_compile.errors import CheckpointError, UnsupportedModelError
from specmoe_compile.hf.checkpoint import CheckpointTensor
from specmoe_compile.hf.quantised.awq import Awq
from specmoe_compile.hf.quantised.base import QuantisedFormat, QuantisedWeight
from specmoe_compile.hf.quantised.bitsandbytes import BitsAndBytes
from specmoe_compile.hf.quantised.compressed_tensors import CompressedTensors
from specmoe_compile.hf.quantised.fp8 import BlockFp8
from specmoe_compile.hf.quantised.gptq import Gptq
from specmoe_compile.hf.quantised.modelopt import ModelOpt
from specmoe_compile.hf.quantised.mxfp4 import Mxfp4

_FORMATS: Mapping[str, Callable[[Mapping[str, Any]], QuantisedFormat]] = {
    "mxfp4": Mxfp4,
    "fp8": BlockFp8,
    "compressed-tensors": CompressedTensors,
    "modelopt": ModelOpt,
    "gptq": Gptq,
    "awq": Awq,
    "bitsandbytes": BitsAndBytes,
}
# Ends of keys that only a quantised checkpoint has: without a configuration that says which format
# it is, such tensors cannot be read, and must not be taken for missing ones.
_CODED_SUFFIXES = (
    ".qweight",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight.absmax",
    "_proj_blocks",
)
MODELOPT_FILE = "hf_quant_config.json"
"""Written by ModelOpt beside the weights; older exports have no `quantization_config`."""
_CODE_DTYPES = ("U8", "I8", "I32", "F4")
_FLOAT8_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0")


def take_format(config: Any) -> QuantisedFormat | None:
    """Take the quantisation out of a configuration, so that a plain model is built from it.

    Returns:
        the checkpoint's format, None for a plain checkpoint.

    Raises:
        UnsupportedModelError: specmoe does not read that format.
    """
    get_text_config = getattr(config, "get_text_config", None)
    owners: tuple[Any, ...] = (config, get_text_config() if callable(get_text_config) else None)
    found: QuantisedFormat | None = None
    for owner in owners:
        settings = getattr(owner, "quantization_config", None)
        if settings is None:
            continue
        as_dict = settings if isinstance(settings, Mapping) else settings.to_dict()
        method = as_dict.get("quant_method")
        name = str(getattr(method, "value", method))
        if name not in _FORMATS:
            raise UnsupportedModelError(
                f"The checkpoint is quantised with {name}; specmoe reads unquantised checkpoints"
                f" and those quantised with {', '.join(_FORMATS)}."
            )
        found = _FORMATS[name](as_dict)
        found.settings = {**as_dict, "quant_method": name}
        del owner.quantization_config
    return found


def format_of_file_or_none(path: Path) -> QuantisedFormat | None:
    """The format that ModelOpt's own file says, of a checkpoint whose configuration says none.

    Returns:
        None where nothing is quantised.

    Raises:
        CheckpointError: it is no JSON, or does not name an algorithm.
        UnsupportedModelError: specmoe does not read that format.
    """
    try:
        inner = json.loads(path.read_text(encoding="utf-8"))["quantization"]
        algorithm = inner["quant_algo"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not say how the checkpoint is quantised (quantization.quant_algo):"
            " download it again."
        ) from error
    if algorithm is None:
        return None
    settings = {**inner, "quant_method": "modelopt"}
    format = ModelOpt(settings)
    format.settings = settings
    return format


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainKeys:
    """A checkpoint by the keys that its plain form would have.

    `weights` are those that are quantised; `keys` are all, quantised or not; `settings` is the
    configuration's `quantization_config`, None without one.
    """

    weights: Mapping[str, QuantisedWeight]
    keys: tuple[str, ...]
    settings: Mapping[str, Any] | None


def plain_keys(
    format: QuantisedFormat | None,
    tensors: Mapping[str, CheckpointTensor],
) -> PlainKeys:
    """Group the tensors of a checkpoint into weights.

    Args:
        format: the checkpoint's, None if its configuration has none.
        tensors: all of its tensors.

    Raises:
        CheckpointError: tensors that are quantised, but not as the configuration says.
        UnsupportedModelError: a variant of the format that cannot be read.
    """
    stems: dict[str, dict[str, str]] = {}
    for key in tensors if format is not None else ():
        assert format is not None
        for suffix, part in format.parts.items():
            if key.endswith(suffix):
                stems.setdefault(key[: len(key) - len(suffix)], {})[part] = key
                break
    weights: dict[str, QuantisedWeight] = {}
    taken: set[str] = set()
    for stem, keys in stems.items():
        assert format is not None
        if not format.needed <= keys.keys():
            continue
        parts = {part: tensors[key] for part, key in keys.items()}
        shape, code = format.describe(stem, parts)
        weights[f"{stem}{format.plain_suffix}"] = QuantisedWeight(
            format=format,
            stem=stem,
            keys=tuple(keys.values()),
            parts=parts,
            shape=shape,
            code=code,
            num_experts=format.experts(parts),
        )
        taken.update(keys.values())
    rest = [key for key in tensors if key not in taken]
    if format is not None:
        rest = [key for key in rest if not key.endswith(format.unused)]
    for key in rest:
        _check_plain(key, tensors[key].dtype_name, format)
    return PlainKeys(
        weights=weights,
        keys=(*rest, *weights),
        settings=None if format is None else format.settings,
    )


def _check_plain(key: str, dtype_name: str, format: QuantisedFormat | None) -> None:
    """Raise `CheckpointError` if a tensor that no weight was made of is one of codes or scales."""
    if key.endswith(_CODED_SUFFIXES):
        what = f"The checkpoint's {key} belongs to a quantised weight"
    elif key.endswith(".weight") and (
        dtype_name in _CODE_DTYPES or (format is not None and dtype_name in _FLOAT8_DTYPES)
    ):
        what = f"The checkpoint's {key} is {dtype_name}, codes without scales"
    else:
        return
    if format is None:
        raise CheckpointError(
            f"{what}, but its configuration (config.json) has no quantization_config to read it by."
        )
    raise CheckpointError(
        f"{what}, but the tensors beside it are not those that its quantization_config promises."
    )
