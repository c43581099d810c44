"""Records that are quantised while a store is filled (`quantize=`).

Memory: the plain record of one expert, and a few times the rows that are quantised at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch

from specmoe_compile.errors import CheckpointError
from specmoe_compile.runtime.experts.formats.quantise import METHOD, QUANTISED_FORMATS, quantise
from specmoe_compile.runtime.experts.formats.weight_code import WeightPlanes
from specmoe_compile.runtime.experts.layout import ExpertLayout, StoreLayer
from specmoe_compile.runtime.experts.module import ExpertsLayer, with_format
from specmoe_compile.runtime.store.base import RecordSource
from specmoe_compile.runtime.store.header import layers_to_json


class QuantisingSource:
    """A source of plain records, quantised; itself a `RecordSource`.

    Attributes:
        experts_layers: the layers, with the layout of quantised records.
    """

    def __init__(self, source: RecordSource, layers: Sequence[ExpertsLayer], quantize: str) -> None:
        """Lay out quantised records.

        Args:
            source: of plain records, laid out as `layers` say.
            layers: the model's MoE layers.
            quantize: a key of `QUANTISED_FORMATS`.
        """
        format = QUANTISED_FORMATS[quantize]
        self.experts_layers = tuple(
            with_format(layer, format, {spec.name: spec.dtype for spec in layer.layout.tensors})
            for layer in layers
        )
        self.layers: tuple[StoreLayer, ...] = tuple(
            layer.store_layer for layer in self.experts_layers
        )
        self.name = f"{source.name} ({quantize})"
        self.top_k = source.top_k
        self.source_files = source.source_files
        self.content = source.content
        self._source = source
        self._plain: list[ExpertLayout] = [layer.layout for layer in layers]
        self._transposed = [bool(layer.module.is_transposed) for layer in layers]
        text = json.dumps(
            {
                "layers": layers_to_json(self.layers),
                "source": source.fingerprint,
                "quantize": [quantize, METHOD],
            },
            sort_keys=True,
        )
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def fill(self, layer: int, expert: int, record: torch.Tensor) -> None:
        plain = torch.empty(self._plain[layer].record_bytes, dtype=torch.uint8)
        self._source.fill(layer, expert, plain)
        layout = self.layers[layer].layout
        made = layout.views(record)
        for name, values in self._plain[layer].views(plain).items():
            if name.endswith("_bias"):
                made[name].copy_(values)
                continue
            weight = values.t() if self._transposed[layer] else values
            try:
                planes = quantise(weight, layout.format.code(name))
            except ValueError as error:
                raise CheckpointError(
                    f"{self.layers[layer].name}.{name} of expert {expert} cannot be quantised:"
                    f" {error}."
                ) from error
            WeightPlanes.of(made, name).copy_(planes)
