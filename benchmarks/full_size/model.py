"""Models of full shape whose experts exist only as records of a store in host memory.

Attention, routers, norms and embeddings are random on the device. The experts' parameters are meta
tensors that give the records their layout and are then released; the records themselves are drawn
on the device layer by layer and copied to where the store keeps them, page-locked.

Shape letters: E experts, K top-k, C context, N steps, L MoE layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.full_size.configs import (
    deepseek_v2_lite,
    gpt_oss_20b,
    qwen3_30b,
    tiny_deepseek,
    tiny_gpt_oss,
    tiny_qwen3,
)
from benchmarks.kernels.compile_spec import FP8, INT4, MXFP4, NVFP4
from specmoe_compile.errors import StoreError
from specmoe_compile.hf.compiled_calls import _mark_static
from specmoe_compile.runtime.cuda.page_lock import PageLock
from specmoe_compile.runtime.experts.formats.code_books import INT4_ZERO
from specmoe_compile.runtime.experts.formats.expert_format import (
    DOWN_NAME,
    PLAIN_FORMAT,
    UP_NAMES,
    ExpertFormat,
)
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode
from specmoe_compile.runtime.experts.layout import ExpertLayout, StoreLayer
from specmoe_compile.runtime.experts.module import (
    ExpertsLayer,
    find_experts_layers,
    release_experts,
)
from specmoe_compile.runtime.store.ram import RamStore
from specmoe_compile.system.machine import available_ram_bytes
from specmoe_compile.system.sizes import format_bytes

SEED = 0
_CACHE_MULTIPLE = 64  # aligned rows of the attention mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model to be built: its name, configuration, dtype and the format of its experts."""

    name: str
    config: Callable[[], Any]
    dtype: torch.dtype = torch.bfloat16
    format: ExpertFormat = PLAIN_FORMAT

    def configured(self, layers: int | None = None) -> Any:
        """The configuration, with fewer layers if `layers` says so."""
        config = self.config()
        if layers is not None and layers != config.num_hidden_layers:
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = (config.layer_types * layers)[:layers]
        return config


def _both(code: WeightCode) -> ExpertFormat:
    return ExpertFormat(up=code, down=code)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="Qwen3-30B-A3B", config=qwen3_30b),
        Shape(name="Qwen3-30B-A3B-nvfp4", config=qwen3_30b, format=_both(NVFP4)),
        Shape(name="Qwen3-30B-A3B-fp8", config=qwen3_30b, format=_both(FP8)),
        Shape(name="Qwen3-30B-A3B-int4", config=qwen3_30b, format=_both(INT4)),
        Shape(name="GPT-OSS-20B", config=gpt_oss_20b),
        Shape(name="GPT-OSS-20B-mxfp4", config=gpt_oss_20b, format=_both(MXFP4)),
        Shape(name="DeepSeek-V2-Lite", config=deepseek_v2_lite),
        Shape(name="DeepSeek-V2-Lite-fp8", config=deepseek_v2_lite, format=_both(FP8)),
        Shape(name="tiny-deepseek", config=tiny_deepseek, dtype=torch.float32),
        Shape(name="tiny-qwen3", config=tiny_qwen3, dtype=torch.float32),
        Shape(name="tiny-gpt-oss", config=tiny_gpt_oss, dtype=torch.float32),
        Shape(name="tiny-qwen3-nvfp4", config=tiny_qwen3, dtype=torch.float32, format=_both(NVFP4)),
        Shape(
            name="tiny-gpt-oss-mxfp4",
            config=tiny_gpt_oss,
            dtype=torch.float32,
            format=_both(MXFP4),
        ),
    )
}
DRY_SHAPES = ("tiny-qwen3", "tiny-gpt-oss")


class InlineStreams:
    """`Streams` of a machine without any: all work runs in the order of issue."""

    capturing = False

    def record(self, stream: str) -> str:
        """Nothing is ever pending; an event is not None all the same."""
        return stream

    def wait(self, stream: str, event: Any) -> None:
        """Nothing is ever pending."""

    def on(self, stream: str) -> AbstractContextManager[Any]:
        return nullcontext()

    def reached(self, event: Any) -> bool:
        """Nothing is ever pending."""
        return True

    def synchronize(self, event: Any) -> None:
        """Nothing is ever pending."""

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def to_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.to(device)


@contextmanager
def _experts_on_meta() -> Iterator[None]:
    def wrapped(init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def on_meta(self: Any, *args: Any, **kwargs: Any) -> None:
            with torch.device("meta"):
                init(self, *args, **kwargs)

        return on_meta

    with ExitStack() as held:
        for kind in (Qwen3MoeExperts, GptOssExperts, DeepseekV2Experts):
            held.enter_context(mock.patch.object(kind, "__init__", wrapped(kind.__init__)))
        yield


def build_skeleton(
    shape: Shape, device: torch.device, *, layers: int | None = None
) -> tuple[Any, list[ExpertsLayer]]:
    """A random model on `device` whose experts are released, and what its MoE layers are."""
    torch.manual_seed(SEED)
    with torch.device(device), _experts_on_meta():
        model = AutoModelForCausalLM.from_config(shape.configured(layers), dtype=shape.dtype)
    found = find_experts_layers(model)
    for layer in found:
        release_experts(layer, device)
    return model.eval().requires_grad_(False), [coded(layer, shape.format) for layer in found]


def coded(layer: ExpertsLayer, format: ExpertFormat) -> ExpertsLayer:
    """The layer with records of another format; its experts must be released already."""
    if format.is_plain:
        return layer
    turn = bool(layer.module.is_transposed)
    specs = layer.layout.tensors
    sizes = {
        spec.name: spec.shape[::-1] if turn and len(spec.shape) == 2 else spec.shape
        for spec in specs
    }
    tensors = format.tensors(sizes, {spec.name: spec.dtype for spec in specs})
    return replace(layer, layout=ExpertLayout.from_shapes(tensors, format))


# Root mean square of the codes of a book, where all codes are equally frequent.
_CODE_RMS = {"e2m1": 2.9, "e4m3": 1.0, "int4": 4.6, "nf4": 0.56, "int8": 74.0}


def draw_planes(
    views: Mapping[str, Tensor], name: str, code: WeightCode, std: float, generator: torch.Generator
) -> None:
    """Draw the planes of a coded weight so that its values have this standard deviation."""
    codes, device = views[name], generator.device
    if code.book == "e4m3":
        # In parts: the numbers take four times the room of their codes.
        for part in codes:
            values = torch.randn(part.shape, generator=generator, device=device)
            part.copy_(values.to(torch.float8_e4m3fn).view(torch.uint8))
    else:
        codes.view(torch.uint8).random_(0, 256, generator=generator)
    scale = std / _CODE_RMS[code.book]
    if code.has_global:
        views[f"{name}_global"].fill_(scale)
        scale = 1.0
    scales = views[f"{name}_scales"]
    if code.scale == "e8m0":
        scales.fill_(127 + round(math.log2(scale)))
    elif code.scale == "e4m3":
        byte = torch.tensor(scale).to(torch.float8_e4m3fn).view(torch.uint8)
        scales.fill_(int(byte))
    else:
        scales.fill_(scale)
    if code.has_zero:
        views[f"{name}_zeros"].fill_(INT4_ZERO)


class RandomStore(RamStore):
    """Random records that outlive the sessions which read them; closed by `give_back`."""

    def __init__(
        self, layers: list[ExpertsLayer], top_k: int, device: torch.device, *, std: float
    ) -> None:
        """Reserve, page-lock for a GPU, and fill with normals of `std`.

        Raises:
            StoreError: there is not enough memory, or it cannot be page-locked.
        """
        self.layers: tuple[StoreLayer, ...] = tuple(layer.store_layer for layer in layers)
        self.top_k = top_k
        self.fingerprint = "random".ljust(64, "0")
        needed = sum(layer.total_bytes for layer in self.layers)
        if needed > available_ram_bytes():
            raise StoreError(
                f"The experts need {format_bytes(needed)} of RAM and"
                f" {format_bytes(available_ram_bytes())} are free: take fewer --layers."
            )
        super().__init__(self)  # type: ignore[arg-type]  # its own source of shapes
        self._lock = PageLock(self.region) if device.type == "cuda" else None
        for layer in range(len(self.layers)):
            self._fill(layer, device, std)

    @torch.no_grad()
    def _fill(self, layer: int, device: torch.device, std: float) -> None:
        """Draw a layer's experts on the device and copy them into its records."""
        records = self.layer_records(layer)
        generator = torch.Generator(device).manual_seed(SEED + layer)
        bank = torch.zeros(records.shape, dtype=torch.uint8, device=device)
        layout = self.layouts[layer]
        views = layout.bank_views(bank)
        for name, view in views.items():
            code = layout.format.code(name)
            if name in (*UP_NAMES, DOWN_NAME) and not code.is_plain:
                draw_planes(views, name, code, std, generator)
            elif name.endswith("_bias") or name in (*UP_NAMES, DOWN_NAME):
                view.normal_(std=std, generator=generator)
        records.copy_(bank)

    def close(self) -> None:
        """A session that ends leaves the store open for the next one."""

    def give_back(self) -> None:
        """Unlock and free the memory."""
        if self._lock is not None:
            self._lock.release()
        super().close()


def cached_sizes(config: Any) -> tuple[int, int, int]:
    """Heads that a cache keeps, and sizes of a key and a value of one of them.

    With multi-head latent attention that is one latent, and the part with positions.
    """
    if getattr(config, "kv_lora_rank", None):
        return 1, config.kv_lora_rank, config.qk_rope_head_dim
    return config.num_key_value_heads, config.head_dim, config.head_dim


class FilledCache:
    """A static cache that holds random keys and values of C tokens, before the first step.

    Attributes:
        cache: the cache.
    """

    def __init__(
        self, config: Any, context: int, steps: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Reserve and fill.

        Args:
            config: of the model.
            context: C.
            steps: N, room for as many new tokens.
            device, dtype: of keys and values.
        """
        rows = -(-(context + steps) // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
        self.context = context
        self.cache = StaticCache(config=config, max_cache_len=rows)
        # Layers of this cache are static, of full or of sliding attention.
        self._layers: list[Any] = list(self.cache.layers)
        heads, *sizes = cached_sizes(config)
        kept = [torch.empty(1, heads, 0, size, dtype=dtype, device=device) for size in sizes]
        for layer in self._layers:
            layer.lazy_initialization(*kept)
        generator = torch.Generator(device).manual_seed(SEED)
        for layer in self._layers:
            if layer.is_sliding and layer.max_cache_len > context:
                raise ValueError(
                    f"A context of {context} does not fill a sliding window of"
                    f" {layer.max_cache_len}: take a longer one."
                )
            layer.keys.normal_(generator=generator)
            layer.values.normal_(generator=generator)
        # A full sliding window loses its oldest token with each new one.
        self._windows = [
            (layer, layer.keys.clone(), layer.values.clone())
            for layer in self._layers
            if layer.is_sliding
        ]
        self.rewind()
        _mark_static(self.cache)

    def rewind(self) -> None:
        """Go back to the C tokens of the beginning."""
        for layer, keys, values in self._windows:
            layer.keys.copy_(keys)
            layer.values.copy_(values)
        for layer in self._layers:
            layer.cumulative_length.fill_(self.context)
        self.hold()

    def hold(self) -> None:
        """Keep the host's count of full sliding windows, which compiled code is guarded by."""
        for layer in self._layers:
            if layer.is_sliding:
                layer.cumulative_length_int = self.context


def random_tokens(vocabulary: int, count: int, device: torch.device) -> Tensor:
    """Token ids, [1, count]."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(2, vocabulary, (1, count), generator=generator).to(device)
