"""Which tensors of a checkpoint make which expert tensors, and which are left for the loader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from specmoe_compile.errors import UnsupportedModelError
from specmoe_compile.hf.quantised.base import QuantisedWeight
from specmoe_compile.runtime.experts.module import ExpertsLayer


@dataclass(slots=True)
class Recipe:
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

    recipes: dict[str, Recipe]
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
                target, Recipe(collected_name=name, converter=converter)
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


def source_keys(
    recipes: Mapping[str, Recipe], layer: ExpertsLayer, weights: Mapping[str, QuantisedWeight]
) -> list[str]:
    """Return the checkpoint's keys that a layer's experts are made from."""
    made = [recipes[f"{layer.name}.{spec.name}"] for spec in layer.layout.tensors]
    plain = {key for recipe in made for keys in recipe.sources.values() for key in keys}
    return sorted(
        key for name in plain for key in (weights[name].keys if name in weights else (name,))
    )


def recipe_digest(recipes: Mapping[str, Recipe], settings: Mapping[str, Any] | None) -> str:
    """Return the digest of how a checkpoint's tensors are made into experts."""
    made = {
        name: [
            sorted(recipe.sources.items()),
            [type(op).__name__ for op in getattr(recipe.converter, "operations", ())],
        ]
        for name, recipe in recipes.items()
    }
    method: Any = "None" if settings is None else settings
    text = json.dumps([made, method, None], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
