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
from functools import partial
from typing import Any

import torch
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from specmoe_compile.errors import CheckpointError, UnsupportedModelError
from specmoe_compile.hf.adapter import Adapter
from specmoe_compile.hf.checkpoint import Checkpoint, CheckpointTensor
from specmoe_compile.hf.key_assignment import Recipe, recipe_digest, source_keys
from specmoe_compile.hf.quantised.base import QuantisedWeight
from specmoe_compile.hf.quantised.experts import CodedTensor, join_sources
from specmoe_compile.hf.quantised.schemes import PlainKeys
from specmoe_compile.runtime.experts.formats.expert_format import ExpertFormat
from specmoe_compile.runtime.experts.formats.weight_code import PLAIN, WeightPlanes, dequantise
from specmoe_compile.runtime.experts.layout import StoreLayer
from specmoe_compile.runtime.experts.module import (
    ExpertsLayer,
    expert_parameter_names,
    with_format,
)
from specmoe_compile.runtime.store.header import layers_to_json
from specmoe_compile.runtime.store.source_content import SourceContent


class CheckpointSource:
    """The records of a checkpoint's experts, as a `RecordSource`.

    Memory: the tensors of one expert, or of one layer where a conversion mixes experts.
    """

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        layers: Sequence[ExpertsLayer],
        recipes: Mapping[str, Recipe],
        *,
        top_k: int,
        name: str,
        plain: PlainKeys,
        keep_codes: bool,
        adapter: Adapter | None = None,
    ) -> None:
        """Check that the checkpoint has every expert, and lay out their records.

        Args:
            model: on the meta device, with its full parameters.
            checkpoint: open while the source is used.
            layers: the model's MoE layers.
            recipes: how their tensors are made (`assign_checkpoint_keys`).
            top_k: K.
            name: for people.
            plain: the checkpoint's weights by their plain keys.
            keep_codes: records hold the codes of quantised weights; else their values, in the
                dtype of the model.
            adapter: what is added to the experts; needs values.

        Raises:
            CheckpointError: a tensor is missing, or experts do not fit together.
            UnsupportedModelError: codes that cannot be kept.
        """
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
        self._coded = self._join_codes(layers, plain.weights)
        self.experts_layers = tuple(
            self._with_codes(layer) if keep_codes else layer for layer in layers
        )
        self.layers: tuple[StoreLayer, ...] = tuple(
            layer.store_layer for layer in self.experts_layers
        )
        self._transposed = [bool(layer.module.is_transposed) for layer in layers]
        self._names = [expert_parameter_names(layer.module) for layer in layers]
        self._adapter = adapter if adapter is not None and adapter.digest is not None else None
        self.fingerprint = _fingerprint(
            self.layers,
            checkpoint.identity(),
            plain.settings,
            None if self._adapter is None else self._adapter.digest,
        )
        self.content: SourceContent | None = checkpoint.content(
            [source_keys(recipes, layer, plain.weights) for layer in layers],
            recipe=recipe_digest(recipes, plain.settings),
        )

    def _join_codes(
        self, layers: Sequence[ExpertsLayer], weights: Mapping[str, QuantisedWeight]
    ) -> dict[str, CodedTensor]:
        """Describe the experts' tensors that are made of quantised weights, by name."""
        coded: dict[str, CodedTensor] = {}
        for layer in layers:
            for spec in layer.layout.tensors:
                name = f"{layer.name}.{spec.name}"
                recipe = self._recipes[name]
                quantised = [k for keys in recipe.sources.values() for k in keys if k in weights]
                if not quantised:
                    continue
                if len(quantised) != sum(map(len, recipe.sources.values())):
                    raise UnsupportedModelError(
                        f"{name} is made of quantised and of plain weights, which specmoe does not"
                        f" join; {quantised[0]} is quantised."
                    )
                outputs, inputs = spec.shape[::-1] if layer.module.is_transposed else spec.shape
                coded[name] = join_sources(
                    name,
                    {p: [weights[key] for key in keys] for p, keys in recipe.sources.items()},
                    None
                    if recipe.converter is None
                    else partial(self._convert, name, recipe, rows=1),
                    num_experts=layer.num_experts,
                    transposed=bool(layer.module.is_transposed),
                    shape=(outputs, inputs),
                )
        return coded

    def _with_codes(self, layer: ExpertsLayer) -> ExpertsLayer:
        """Lay out a record of the codes that a layer has."""
        up, down = (
            self._coded.get(f"{layer.name}.{name}")
            for name in expert_parameter_names(layer.module)
            if not name.endswith("_bias")
        )
        if up is None and down is None:
            return layer
        dtypes = {spec.name: spec.dtype for spec in layer.layout.tensors}
        for name in dtypes:
            if name.endswith("_bias"):
                # As they are, so that a record does not depend on the model's dtype.
                sources = self._recipes[f"{layer.name}.{name}"].sources
                dtypes[name] = self._tensor(next(iter(sources.values()))[0]).dtype
        return with_format(
            layer,
            ExpertFormat(
                up=PLAIN if up is None else up.code, down=PLAIN if down is None else down.code
            ),
            dtypes,
        )

    def fill(self, layer: int, expert: int, record: torch.Tensor) -> None:
        if layer != self._whole_layer:
            self._whole.clear()
            self._whole_layer = layer
        spec = self.layers[layer]
        views = spec.layout.views(record)
        for tensor_name in self._names[layer]:
            name = f"{spec.name}.{tensor_name}"
            coded = self._coded.get(name)
            if coded is not None:
                planes = coded.planes(expert)
                if not spec.layout.format.code(tensor_name).is_plain:
                    WeightPlanes.of(views, tensor_name).copy_(planes)
                    continue
                tensor = dequantise(planes, coded.code)
                tensor = tensor.t() if self._transposed[layer] else tensor
            else:
                tensor = self._expert_tensor(name, expert, spec.num_experts)
                if not spec.layout.format.is_plain and self._transposed[layer]:
                    tensor = tensor.t() if tensor.dim() == 2 else tensor
            view = views[tensor_name]
            if tensor.shape != view.shape:
                raise CheckpointError(
                    f"The checkpoint's experts do not fit the model: {name} of one expert is "
                    f"{tuple(tensor.shape)}, the configuration expects {tuple(view.shape)}."
                )
            view.copy_(tensor)
        if self._adapter is not None:
            self._adapter.add_to(spec.name, expert, views)

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

    def _convert_whole(self, name: str, recipe: Recipe, num_experts: int) -> torch.Tensor:
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
        self, name: str, recipe: Recipe, parts: dict[str, list[torch.Tensor]], *, rows: int
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
    return at == 0 and all(_keeps_rows_apart(op) for op in converter.operations[1:])


def _slices_expert_wise(converter: WeightConverter) -> bool:
    """Whether a chain maps each row of its sources to the same row of its target."""
    return all(_keeps_rows_apart(op) for op in converter.operations)


def _keeps_rows_apart(op: Any) -> bool:
    if type(op) is Transpose:
        return op.dim0 >= 1 and op.dim1 >= 1
    if type(op) in (Chunk, Concatenate, Interleave):
        # A negative dimension may be the first one of a bias.
        return bool(op.dim >= 1)
    return False


def _fingerprint(
    layers: Sequence[StoreLayer],
    identity: str,
    settings: Mapping[str, Any] | None,
    adapter: str | None,
) -> str:
    """Return the digest that names a store: which weights, in which records, what is added."""
    named: dict[str, Any] = {"layers": layers_to_json(layers), "weights": identity}
    if settings is not None:
        named["quantization_config"] = settings
    if adapter is not None:
        named["adapter"] = adapter
    text = json.dumps(named, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
