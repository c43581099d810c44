"""Loading a model with the Hugging Face loader, but without its experts.

transformers builds the model on the meta device, resolves the checkpoint's files, and then calls
one static method, `_load_pretrained_model`, to read the weights. We load through a subclass that
has another one: it takes the experts' tensors out, hands them over as records, leaves empty
parameters in their place and lets the original method read the rest. Everything else (download,
configuration, conversion, tied weights, data types, generation settings) is the loader's own. The
model gets its real class back afterwards.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from specmoe_compile.errors import CheckpointError, SpecMoEError, UnsupportedModelError
from specmoe_compile.hf.adapter import Adapter
from specmoe_compile.hf.checkpoint import Checkpoint
from specmoe_compile.hf.conversion import CheckpointSource
from specmoe_compile.hf.key_assignment import KeyAssignment, assign_checkpoint_keys
from specmoe_compile.hf.load_options import (
    HUB_OPTIONS,
    LOADER_OPTIONS,
    checked_options,
)
from specmoe_compile.hf.missing_weights import (
    MissingWeights,
    missing_before_loading,
    report_missing,
)
from specmoe_compile.hf.model_config import (
    check_local_folder,
    first_sentence,
    hub_error,
    load_model_config,
    model_class_of,
    modelopt_or_none,
)
from specmoe_compile.hf.quantised.base import QuantisedFormat
from specmoe_compile.hf.quantised.schemes import (
    PlainKeys,
    plain_keys,
    take_format,
)
from specmoe_compile.runtime.experts.module import (
    ExpertsLayer,
    expert_parameter_names,
    find_experts_layers,
    find_top_k,
    is_experts_module,
    release_experts,
)
from specmoe_compile.runtime.store.base import RecordSource
from specmoe_compile.runtime.store.quantising_source import QuantisingSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """A model whose parameters are still on the meta device, and the records of its experts."""

    model: PreTrainedModel
    layers: list[ExpertsLayer]
    source: RecordSource
    top_k: int


class _Finished(Exception):
    """Ends loading once the experts are placed, for those who want nothing else."""


def load_without_experts(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str,
    device: torch.device,
    hf_options: Mapping[str, Any],
    place_experts: Callable[[Skeleton], None],
    missing_weights: MissingWeights = "error",
    quantize: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> PreTrainedModel:
    """Load a model; its experts go to `place_experts`, and its modules get empty parameters.

    Args:
        path_or_id: a local folder, or a model's name on the Hugging Face hub.
        dtype: a torch dtype, or "auto" for the checkpoint's.
        device: where the parameters that are not experts go.
        hf_options: options of the Hugging Face loader, and fields of the configuration.
        place_experts: called once, before any weight is read.
        missing_weights: what becomes of weights that the checkpoint lacks: "error", or "random".
        quantize: experts are quantised while they are packed, a key of `QUANTISED_FORMATS`; None
            for the checkpoint's own numbers.
        adapter: folder or hub name of a LoRA adapter to merge.

    Raises:
        CheckpointError: files or weights are missing, truncated, or do not fit the configuration.
        UnsupportedModelError: the model is not a MoE that can be offloaded.
        ValueError: an unknown option.
    """
    options = checked_options(hf_options)
    if str(path_or_id).startswith("~"):
        path_or_id = Path(path_or_id).expanduser()
    check_local_folder(path_or_id, options)
    hub_options = {name: options[name] for name in HUB_OPTIONS if name in options}
    config = load_model_config(path_or_id, options, hub_options)
    format = take_format(config) or modelopt_or_none(path_or_id, hub_options)
    if format is not None and dtype == "auto" and getattr(config, "dtype", None) is None:
        dtype = torch.bfloat16  # not that of the first tensor, which may be one of codes
    model_class = model_class_of(path_or_id, config, options, hub_options)
    reader = _WeightReader(
        name=str(path_or_id),
        format=format,
        device=device,
        place_experts=place_experts,
        missing_weights=missing_weights,
        quantize=quantize,
        adapter_path=adapter,
    )
    loader_class = _loader_of(model_class, reader)
    loader_options = {name: options[name] for name in LOADER_OPTIONS if name in options}
    loader_options.pop("code_revision", None)
    try:
        model: PreTrainedModel
        model, info = loader_class.from_pretrained(
            path_or_id,
            **{**loader_options, **hub_options, "config": config},
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    except OSError as error:
        raise hub_error(path_or_id, error) from error
    except ValueError as error:
        if "Cannot evenly shard" not in str(error):
            raise
        raise UnsupportedModelError(
            f"{path_or_id}: {first_sentence(error)} Start as many processes as divide the experts."
        ) from error
    if not reader.called:
        raise SpecMoEError(
            f"transformers {transformers.__version__} did not load the weights of {path_or_id} in "
            "the way that specmoe knows; use a version from 5.17 on."
        )
    model.__class__ = model_class
    unknown = list(info["unexpected_keys"])
    report_missing(model, str(path_or_id), info["missing_keys"], unknown, missing_weights)
    if reader.adapter is not None:
        reader.adapter.merge_into(model)
    return model


def read_experts(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str,
    hf_options: Mapping[str, Any],
    place_experts: Callable[[Skeleton], None],
    quantize: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> None:
    """Hand a checkpoint's experts to `place_experts`, and load nothing else. Raises as loading."""

    def place_and_stop(skeleton: Skeleton) -> None:
        place_experts(skeleton)
        raise _Finished

    try:
        load_without_experts(
            path_or_id,
            dtype=dtype,
            device=torch.device("cpu"),
            hf_options=hf_options,
            place_experts=place_and_stop,
            missing_weights="random",  # nothing else is loaded
            quantize=quantize,
            adapter=adapter,
        )
    except _Finished:
        return


def checked_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """Return a torch dtype, or "auto"; raises `ValueError` for what experts cannot be kept in."""
    if dtype == "auto":
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"dtype={dtype!r} is not valid: give 'auto', 'float32', 'bfloat16' or 'float16'."
        )
    return found


def _loader_of(model_class: type[PreTrainedModel], reader: _WeightReader) -> Any:
    """A subclass with the same name, whose loader reads weights through `reader`."""

    def load_weights(
        model: PreTrainedModel, state_dict: Any, files: Any, load_config: Any, *args: Any
    ) -> Any:
        read_rest = super(loader_class, loader_class)._load_pretrained_model
        return reader.read(read_rest, model, files, load_config, *args)

    loader_class: Any = type(
        model_class.__name__,
        (model_class,),
        {
            "__module__": model_class.__module__,
            "__qualname__": model_class.__qualname__,
            "_load_pretrained_model": staticmethod(load_weights),
        },
    )
    return loader_class


@dataclass(slots=True, kw_only=True)
class _WeightReader:
    """Reads a checkpoint's weights when the loader would: the experts first, to their place.

    Attributes:
        name: of the model, for messages.
        format: how the checkpoint codes its weights; None for plain ones.
        device, place_experts, missing_weights, quantize, adapter_path: as `load_without_experts`
            takes them.
        called: whether the loader came to it.
        adapter: what `adapter_path` names, once it was read.
    """

    name: str
    format: QuantisedFormat | None
    device: torch.device
    place_experts: Callable[[Skeleton], None]
    missing_weights: MissingWeights
    quantize: str | None
    adapter_path: str | os.PathLike[str] | None
    called: bool = False
    adapter: Adapter | None = None

    def read(
        self, read_rest: Any, model: PreTrainedModel, files: Any, load_config: Any, *args: Any
    ) -> Any:
        """Place the experts and let the loader's own `read_rest` read everything else."""
        self.called = True
        if not files:
            raise CheckpointError(f"{self.name} has no safetensors weights.")
        with Checkpoint(files) as checkpoint:
            plain = plain_keys(self.format, checkpoint.tensors)
            _apply_dtype_plan(model, load_config.dtype_plan or {})
            layers = find_experts_layers(model)
            mapping = load_config.weight_mapping or []
            assignment = assign_checkpoint_keys(model, plain.keys, mapping, layers)
            lacking = []
            if self.missing_weights == "error":
                lacking = missing_before_loading(model, assignment.made)
            report_missing(model, self.name, lacking, assignment.unknown, self.missing_weights)
            if self.adapter_path is not None:
                self.adapter = Adapter(model, layers, self.adapter_path)
            experts = self._take_experts(model, checkpoint, layers, assignment, plain)
            tensors = {**checkpoint.tensors, **plain.weights}
            rest = {key: tensors[key] for key in assignment.resident_keys}
            # Weights go straight to the device; the loader's own option would need accelerate.
            load_config = dataclasses.replace(load_config, device_map={"": self.device})
            info, index = read_rest(model, rest, None, load_config, *args)
        info.missing_keys -= experts
        return info, index

    def _take_experts(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        layers: list[ExpertsLayer],
        assignment: KeyAssignment,
        plain: PlainKeys,
    ) -> set[str]:
        """Place the experts and empty their parameters; returns the names of these."""
        top_k = find_top_k(model, layers)
        # An adapter is added to values; codes are what they are.
        adds = self.adapter is not None and self.adapter.digest is not None
        source = CheckpointSource(
            model,
            checkpoint,
            layers,
            assignment.recipes,
            top_k=top_k,
            name=self.name,
            plain=plain,
            keep_codes=self.quantize is None and not adds,
            adapter=self.adapter,
        )
        made = source if self.quantize is None else QuantisingSource(source, layers, self.quantize)
        coded = list(made.experts_layers)
        self.place_experts(Skeleton(model=model, layers=coded, source=made, top_k=top_k))
        for layer in layers:
            release_experts(layer, self.device)
        return {f"{layer.name}.{spec.name}" for layer in layers for spec in layer.layout.tensors}


def _apply_dtype_plan(model: PreTrainedModel, plan: Mapping[str, torch.dtype]) -> None:
    """Give experts the dtype that the loader would keep them in (some models keep float32)."""
    for name, module in model.named_modules():
        if not is_experts_module(module):
            continue
        for parameter_name in expert_parameter_names(module):
            full_name = f"{name}.{parameter_name}"
            for pattern, dtype in plan.items():
                if re.search(pattern.replace("*", ".*"), full_name):
                    parameter = getattr(module, parameter_name)
                    kept = torch.nn.Parameter(parameter.to(dtype), requires_grad=False)
                    module.register_parameter(parameter_name, kept)
