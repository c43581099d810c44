"""Expert records from a hub checkpoint, by the weight conversion of transformers itself.

Checkpoints store experts in many ways: a tensor per expert and projection, all experts in one
tensor, transposed, quantised in blocks. transformers knows them all (`conversion_mapping`), as
chains of operations that make one model tensor, [E, ...], out of source tensors. Here the same
chains run on the source tensors of one expert at a time where each operation keeps experts apart,
else on those of one layer.

Shape letters: E experts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from specmoe_compile.errors import CheckpointError, UnsupportedModelError
from specmoe_compile.hf.checkpoint import Checkpoint, CheckpointTensor
from specmoe_compile.runtime.experts.layout import StoreLayer
from specmoe_compile.runtime.experts.module import ExpertsLayer
from specmoe_compile.runtime.store.header import layers_to_json
from specmoe_compile.runtime.store.source_content import SourceContent

# Dequantising works on each expert's blocks alone.
_EXPERT_WISE_NAMES = ("Fp8Dequantize", "Mxfp4Dequantize")


@dataclass(slots=True)
class _Recipe:
    """How one tensor of an experts module, [E, ...], is made.

    `converter` is None where the checkpoint has the tensor as it is. `sources` are the checkpoint's
    keys by the converter's source pattern, in the order in which transformers would collect them.
    `collected_name` is the model tensor that the converter is run for (its first target).
    """

    collected_name: str
    converter: WeightConverter | None
    sources: dict[str, list[str]] = field(default_factory=dict)


@dataclass(slots=True)
class KeyAssignment:
    """Which checkpoint keys make which expert tensors, and which ones are left for the loader.

    `made` names the model's tensors that come of all keys, `unknown` the keys of which none comes.
    """

    recipes: dict[str, _Recipe]
    resident_keys: list[str]
    made: set[str] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)


def assign_checkpoint_keys(
    model: Any, keys: Sequence[str], weight_mapping: Sequence[Any], layers: Sequence[ExpertsLayer]
) -> KeyAssignment:
    """Sort the keys of a checkpoint into those of offloaded experts and the rest.

    It follows transformers' own loop (`convert_and_load_state_dict_in_model`), with copies of the
    mapping because matching a key changes it.

    Args:
        model: the model on the meta device, with its full parameters.
        keys: names of the checkpoint's tensors.
        weight_mapping: renamings and converters that the loader would use.
        layers: the model's MoE layers.

    Raises:
        UnsupportedModelError: one conversion makes both an expert tensor and another one.
    """
    expert_names = {
        f"{layer.name}.{spec.name}" for layer in layers for spec in layer.layout.tensors
    }
    state = model.state_dict()
    mapping = deepcopy(list(weight_mapping))
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    assignment = KeyAssignment(recipes={}, resident_keys=[])
    for key in sorted(keys, key=dot_natural_key):
        prefix = model.base_model_prefix
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        converter = None if pattern is None else by_pattern[pattern]
        targets = [name] if converter is None else _target_names(name, converter)
        known = [target for target in targets if target in state]
        assignment.made.update(known)
        if not known:
            assignment.unknown.append(key)
        wanted = [target for target in targets if target in expert_names]
        if not wanted:
            assignment.resident_keys.append(key)
            continue
        others = [target for target in targets if target not in expert_names and target in state]
        if others:
            raise UnsupportedModelError(
                f"The checkpoint's {key} holds experts ({wanted[0]}) together with {others[0]}, "
                "which is not an expert; specmoe cannot take them apart."
            )
        for target in wanted:
            recipe = assignment.recipes.setdefault(
                target, _Recipe(collected_name=name, converter=converter)
            )
            recipe.sources.setdefault(pattern or key, []).append(key)
    for original, copy in zip(weight_mapping, mapping, strict=True):
        # Saving reverts the conversions that were used, those of experts included.
        original._was_used = original._was_used or copy._was_used
    return assignment


def _target_names(name: str, converter: WeightConverter) -> list[str]:
    """Return all model tensors that a converter makes when its first target is `name`."""
    patterns = converter.target_patterns
    return [name.replace(patterns[0], pattern) for pattern in patterns]


class CheckpointSource:
    """The records of a checkpoint's experts, as a `RecordSource`.

    Memory: the tensors of one expert, or of one layer where a conversion mixes experts.
    """

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        layers: Sequence[ExpertsLayer],
        recipes: Mapping[str, _Recipe],
        *,
        top_k: int,
        name: str,
    ) -> None:
        """Check that the checkpoint has every expert.

        Raises:
            CheckpointError: a tensor is missing.
        """
        self.layers: tuple[StoreLayer, ...] = tuple(layer.store_layer for layer in layers)
        self.top_k = top_k
        self.name = name
        self.source_files = checkpoint.source_files
        self._model = model
        self._checkpoint = checkpoint
        self._recipes = recipes
        self._whole: dict[str, torch.Tensor] = {}
        self._whole_layer = -1
        for layer in layers:
            for spec in layer.layout.tensors:
                if f"{layer.name}.{spec.name}" not in recipes:
                    raise CheckpointError(
                        f"The checkpoint {name} has no weights for {layer.name}.{spec.name}."
                    )
        self.fingerprint = _fingerprint(self.layers, checkpoint.identity())
        self.content: SourceContent | None = checkpoint.content(
            [_source_keys(recipes, layer) for layer in self.layers],
            recipe=_recipe_digest(recipes, model.config),
        )

    def fill(self, layer: int, expert: int, record: torch.Tensor) -> None:
        if layer != self._whole_layer:
            self._whole.clear()
            self._whole_layer = layer
        spec = self.layers[layer]
        for tensor_name, view in spec.layout.views(record).items():
            name = f"{spec.name}.{tensor_name}"
            tensor = self._expert_tensor(name, expert, spec.num_experts)
            if tensor.shape != view.shape:
                raise CheckpointError(
                    f"The checkpoint's experts do not fit the model: {name} of one expert is "
                    f"{tuple(tensor.shape)}, the configuration expects {tuple(view.shape)}."
                )
            view.copy_(tensor)

    def _expert_tensor(self, name: str, expert: int, num_experts: int) -> torch.Tensor:
        """Return one expert's part of a model tensor, without the expert dimension."""
        recipe = self._recipes[name]
        keys = [key for keys in recipe.sources.values() for key in keys]
        if recipe.converter is None:
            self._check_experts(name, keys[0], num_experts)
            return self._tensor(keys[0]).read_rows(expert, 1)[0]
        if _merges_expert_wise(recipe.converter) and all(
            len(source) == num_experts for source in recipe.sources.values()
        ):
            parts = {p: [self._tensor(k[expert]).read()] for p, k in recipe.sources.items()}
            return self._convert(name, recipe, parts, rows=1)[0]
        if _slices_expert_wise(recipe.converter) and all(
            len(source) == 1 and self._tensor(source[0]).shape[:1] == (num_experts,)
            for source in recipe.sources.values()
        ):
            parts = {
                p: [self._tensor(k[0]).read_rows(expert, 1)] for p, k in recipe.sources.items()
            }
            return self._convert(name, recipe, parts, rows=1)[0]
        if name not in self._whole:
            self._whole[name] = self._convert_whole(name, recipe, num_experts)
        return self._whole[name][expert]

    def _convert_whole(self, name: str, recipe: _Recipe, num_experts: int) -> torch.Tensor:
        """Convert the tensor of all experts, [E, ...]."""
        parts = {p: [self._tensor(k).read() for k in keys] for p, keys in recipe.sources.items()}
        tensor = self._convert(name, recipe, parts, rows=num_experts)
        if tensor.shape[0] != num_experts:
            raise CheckpointError(
                f"The checkpoint has {tensor.shape[0]} experts for {name}, the configuration says "
                f"{num_experts}: a shard is missing or belongs to another model."
            )
        return tensor

    def _convert(
        self, name: str, recipe: _Recipe, parts: dict[str, list[torch.Tensor]], *, rows: int
    ) -> torch.Tensor:
        """Run a converter on source tensors, [rows, ...] being what it should make."""
        converter: Any = deepcopy(recipe.converter)
        assert converter is not None
        for pattern, tensors in parts.items():
            for part in tensors:
                converter.add_tensor(recipe.collected_name, pattern, pattern, part)
        model = _RowsOfModel(self._model, rows)
        try:
            made = converter.convert(recipe.collected_name, model=model, config=self._model.config)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"The checkpoint's tensors for {name} cannot be converted: {error}"
            ) from error
        value = made[name]
        tensor: torch.Tensor = value[0] if isinstance(value, list) else value
        return tensor

    def _check_experts(self, name: str, key: str, num_experts: int) -> None:
        shape = self._tensor(key).shape
        if shape[:1] != (num_experts,):
            raise CheckpointError(
                f"The checkpoint's {key} has shape {shape}, but {name} needs {num_experts} experts."
            )

    def _tensor(self, key: str) -> CheckpointTensor:
        return self._checkpoint.tensors[key]


class _RowsOfModel:
    """A model whose experts' tensors show their first `rows` experts only.

    Some operations compare with the shape of the parameter that they make.
    """

    def __init__(self, model: Any, rows: int) -> None:
        self._model = model
        self._rows = rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> torch.Tensor:
        parameter: torch.Tensor = self._model.get_parameter(name)
        return parameter[: self._rows]


def _merges_expert_wise(converter: WeightConverter) -> bool:
    """Whether a chain stacks one tensor per expert and keeps experts apart."""
    merges = [op for op in converter.operations if type(op) is MergeModulelist]
    if len(merges) != 1 or merges[0].dim != 0:
        return False
    at = converter.operations.index(merges[0])
    return all(type(op).__name__ in _EXPERT_WISE_NAMES for op in converter.operations[:at]) and all(
        _keeps_rows_apart(op) for op in converter.operations[at + 1 :]
    )


def _slices_expert_wise(converter: WeightConverter) -> bool:
    """Whether a chain maps each row of its sources to the same row of its target."""
    return all(_keeps_rows_apart(op) for op in converter.operations)


def _keeps_rows_apart(op: Any) -> bool:
    if type(op).__name__ in _EXPERT_WISE_NAMES:
        return True
    if type(op) is Transpose:
        return op.dim0 >= 1 and op.dim1 >= 1
    if type(op) in (Chunk, Concatenate, Interleave):
        # A negative dimension may be the first one of a bias.
        return bool(op.dim >= 1)
    return False


def _source_keys(recipes: Mapping[str, _Recipe], layer: StoreLayer) -> list[str]:
    """Return the checkpoint's keys that a layer's experts are made from."""
    made = [recipes[f"{layer.name}.{spec.name}"] for spec in layer.layout.tensors]
    return sorted({key for recipe in made for keys in recipe.sources.values() for key in keys})


def _recipe_digest(recipes: Mapping[str, _Recipe], config: Any) -> str:
    """Return the digest of how a checkpoint's tensors are made into experts."""
    made = {
        name: [
            sorted(recipe.sources.items()),
            [type(op).__name__ for op in getattr(recipe.converter, "operations", ())],
        ]
        for name, recipe in recipes.items()
    }
    settings = getattr(config, "quantization_config", None) or {}
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    text = json.dumps([made, method, settings.get("weight_block_size")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _fingerprint(layers: Sequence[StoreLayer], identity: str) -> str:
    """Return the digest that names a store: which weights, in which records."""
    text = json.dumps({"layers": layers_to_json(layers), "weights": identity}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
