"""Which model a path or a hub name means: its configuration, and the class that loads it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils.hub import cached_file

from specmoe_compile.errors import CheckpointError, UnsupportedModelError
from specmoe_compile.hf.checkpoint import check_checkpoint_folder
from specmoe_compile.hf.load_options import HUB_OPTIONS, LOADER_OPTIONS, refuse_unknown
from specmoe_compile.hf.quantised.base import QuantisedFormat
from specmoe_compile.hf.quantised.schemes import MODELOPT_FILE, format_of_file_or_none


def check_local_folder(path_or_id: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
    """Check a local folder first: its problems get a clearer message here than further down."""
    folder = Path(path_or_id)
    if folder.is_dir():
        check_checkpoint_folder(folder / options.get("subfolder", ""), options.get("variant"))
    elif folder.exists():
        raise CheckpointError(
            f"{folder} is a file; give the model's folder or its name on the hub."
        )
    elif folder.is_absolute() or str(path_or_id).startswith(".") or len(folder.parts) > 2:
        raise CheckpointError(f"There is no model folder {folder}.")


def load_model_config(
    path_or_id: str | os.PathLike[str], options: Mapping[str, Any], hub_options: dict[str, Any]
) -> Any:
    """Load the configuration with the caller's changes; raises `ValueError` for an unknown one."""
    changes = {
        name: value
        for name, value in options.items()
        if name not in HUB_OPTIONS and name not in LOADER_OPTIONS
    }
    config = deepcopy(options.get("config"))  # what it says about quantisation is taken out
    unknown: Mapping[str, Any] = changes
    if not isinstance(config, transformers.PretrainedConfig):
        try:
            config, unknown = AutoConfig.from_pretrained(
                config or path_or_id,
                return_unused_kwargs=True,
                trust_remote_code=options.get("trust_remote_code", False),
                **hub_options,
                **changes,
            )
        except OSError as error:
            raise hub_error(path_or_id, error) from error
        except ValueError as error:
            if "does not recognize this architecture" not in str(error):
                raise
            raise UnsupportedModelError(f"{path_or_id}: {first_sentence(error)}") from error
    refuse_unknown([name for name in unknown if name not in hub_options], type(config).__name__)
    return config


def modelopt_or_none(
    path_or_id: str | os.PathLike[str], hub_options: Mapping[str, Any]
) -> QuantisedFormat | None:
    """What a file of ModelOpt's says that exports without a `quantization_config` have.

    Raises:
        CheckpointError: it cannot be read.
        UnsupportedModelError: specmoe does not read that format.
    """
    found = cached_file(
        str(path_or_id),
        MODELOPT_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_options,
    )
    return None if found is None else format_of_file_or_none(Path(found))


def model_class_of(
    path_or_id: str | os.PathLike[str],
    config: Any,
    options: Mapping[str, Any],
    hub_options: Mapping[str, Any],
) -> type[PreTrainedModel]:
    """Return the class to load: the checkpoint's own if it can generate, else the usual one.

    Raises:
        UnsupportedModelError: transformers has no generating model for this configuration.
    """
    remote = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    if remote and options.get("trust_remote_code", False):
        code_options = {k: v for k, v in options.items() if k == "code_revision"}
        remote_class: type[PreTrainedModel] = get_class_from_dynamic_module(
            remote, path_or_id, **code_options, **hub_options
        )
        return remote_class
    for name in getattr(config, "architectures", None) or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel) and named.can_generate():
            return named
    for auto_class in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
    ):
        if type(config) in auto_class._model_mapping:
            found: Any = auto_class._model_mapping[type(config)]
            first: type[PreTrainedModel] = found[0] if isinstance(found, (list, tuple)) else found
            return first
    raise UnsupportedModelError(
        f"transformers has no text-generating model for {type(config).__name__}."
    )


def hub_error(path_or_id: str | os.PathLike[str], error: OSError) -> CheckpointError:
    what = "" if Path(path_or_id).exists() else " is no local folder, and"
    return CheckpointError(f"{path_or_id}{what} cannot be loaded: {first_sentence(error)}")


def first_sentence(error: Exception) -> str:
    """Return the first sentence of a message of transformers, which often give whole lectures."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].split(". ")[0].rstrip(".") + "."
