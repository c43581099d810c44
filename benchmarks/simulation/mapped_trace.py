"""Shapes of large models, and a recorded trace of the reference model mapped onto them.

The mapping. A target layer with E experts of which K are used is C = E / 32 copies of a layer of
the reference model (32 experts), each at another place of the recorded text; a copy contributes
the K / C experts that weigh most there. Target layer 0 is made of layer 0, the others of layers 1,
2, .. in order, as many of each. Predictions are mapped the same way, from the same places. So the
counts are the target's and the routing is real, but another model's; what the experts of a real
layer have to do with each other across copies is lost.

Shape letters: R rows, L MoE layers, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specmoe_compile.options import MAX_DECODE_TOKENS
from specmoe_compile.replay.trace import RoutingTrace
from specmoe_compile.runtime.experts.formats.expert_format import PLAIN_FORMAT, ExpertFormat
from specmoe_compile.runtime.experts.formats.quantise import QUANTISED_FORMATS
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode
from specmoe_compile.runtime.experts.layout import ExpertLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What decoding one token of a model reads from memory.

    Attributes:
        layers, experts, top_k: MoE layers, E and K.
        expert_bytes: of one expert.
        layer_bytes: of a MoE layer, apart from its experts: attention, router, shared experts.
        step_bytes: of everything else that a token reads: dense layers, output head.
        note: where the figures come from.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    expert_bytes: int
    layer_bytes: int
    step_bytes: int
    note: str

    @property
    def all_expert_bytes(self) -> int:
        return self.layers * self.experts * self.expert_bytes

    @property
    def other_bytes(self) -> int:
        """Weights apart from the experts, as far as a token reads them."""
        return self.layers * self.layer_bytes + self.step_bytes


def _qwen3_30b() -> ModelShape:
    hidden, heads, kv_heads, head_dim = 2048, 32, 4, 128
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    return ModelShape(
        name="Qwen3-30B-A3B, bf16",
        layers=48,
        experts=128,
        top_k=8,
        expert_bytes=3 * hidden * 768 * 2,
        layer_bytes=2 * (attention + 128 * hidden),
        step_bytes=2 * 151936 * hidden,
        note="bfloat16",
    )


def _record_bytes(format: ExpertFormat, hidden: int, intermediate: int, *, biases: bool) -> int:
    """Bytes of one expert as specmoe stores it: gate and up, down, scales, padding."""
    shapes: dict[str, tuple[int, ...]] = {"gate_up_proj": (2 * intermediate, hidden)}
    if biases:
        shapes["gate_up_proj_bias"] = (2 * intermediate,)
    shapes["down_proj"] = (hidden, intermediate)
    if biases:
        shapes["down_proj_bias"] = (hidden,)
    tensors = format.tensors(shapes, dict.fromkeys(shapes, torch.bfloat16))
    return ExpertLayout.from_shapes(tensors, format).record_bytes


def _gpt_oss_120b(name: str, format: ExpertFormat, note: str) -> ModelShape:
    hidden, heads, kv_heads, head_dim = 2880, 64, 8, 64
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    return ModelShape(
        name=name,
        layers=36,
        experts=128,
        top_k=4,
        expert_bytes=_record_bytes(format, hidden, 2880, biases=True),
        layer_bytes=2 * (attention + 128 * hidden),
        step_bytes=2 * 201088 * hidden,
        note=note,
    )


def _qwen3_235b() -> ModelShape:
    hidden, heads, kv_heads, head_dim = 4096, 64, 4, 128
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    return ModelShape(
        name="Qwen3-235B-A22B, int4",
        layers=94,
        experts=128,
        top_k=8,
        expert_bytes=_record_bytes(QUANTISED_FORMATS["int4"], hidden, 1536, biases=False),
        layer_bytes=2 * (attention + 128 * hidden),
        step_bytes=2 * 151936 * hidden,
        note='quantize="int4", all else in bfloat16',
    )


def _deepseek_v3(name: str, format: ExpertFormat, note: str) -> ModelShape:
    hidden, expert_ffn, dense_ffn = 7168, 2048, 18432
    attention = (
        hidden * 1536 + 1536 * 128 * 192 + hidden * 576 + 512 * 128 * 256 + 128 * 128 * hidden
    )
    shared = 3 * hidden * expert_ffn
    return ModelShape(
        name=name,
        layers=58,
        experts=256,
        top_k=8,
        expert_bytes=_record_bytes(format, hidden, expert_ffn, biases=False),
        layer_bytes=2 * (attention + shared + 256 * hidden),
        step_bytes=2 * (3 * (attention + 3 * hidden * dense_ffn) + 129280 * hidden),
        note=note,
    )


_BLOCK_FP8 = WeightCode(book="e4m3", block=(128, 128), scale="f32")

SHAPES: tuple[ModelShape, ...] = (
    _qwen3_30b(),
    _gpt_oss_120b("GPT-OSS-120B, MXFP4", QUANTISED_FORMATS["mxfp4"], "MXFP4 as released"),
    _gpt_oss_120b("GPT-OSS-120B, bf16", PLAIN_FORMAT, "unpacked to bfloat16"),
    _qwen3_235b(),
    _deepseek_v3(
        "DeepSeek-V3, fp8",
        ExpertFormat(up=_BLOCK_FP8, down=_BLOCK_FP8),
        "experts in FP8 as released, all else in bfloat16",
    ),
    _deepseek_v3(
        "DeepSeek-V3, int4",
        QUANTISED_FORMATS["int4"],
        'quantize="int4", all else in bfloat16',
    ),
)


def mapped_trace(trace: RoutingTrace, shape: ModelShape, *, steps: int) -> RoutingTrace:
    """Return a trace of `steps` decode steps of one token with the shape of another model.

    Args:
        trace: of the reference model; its steps of one token are used.
        shape: whose E is a multiple of the trace's, and whose K of the number of copies.
        steps: at most as many as the trace has.

    Raises:
        ValueError: the shapes do not fit, or the trace is too short.
    """
    source_experts = trace.num_experts[0]
    copies, rest = divmod(shape.experts, source_experts)
    if rest or shape.top_k % copies or any(e != source_experts for e in trace.num_experts):
        raise ValueError(
            f"{shape.experts} experts, top-{shape.top_k}, cannot be made of layers with"
            f" {trace.num_experts} experts."
        )
    parts = _decode_rows(trace)
    rows = len(parts["ids"])
    if rows < steps:
        raise ValueError(f"The trace has {rows} decode steps of one token, {steps} are needed.")
    kept = shape.top_k // copies
    out: dict[str, list[Tensor]] = {name: [] for name in parts}
    for layer in range(shape.layers):
        source = _source_layer(layer, shape.layers, trace.layers)
        taken: dict[str, list[Tensor]] = {name: [] for name in parts}
        for copy in range(copies):
            shift = (layer * copies + copy) * rows // (shape.layers * copies)
            place = (torch.arange(steps) + shift) % rows
            for prefix in ("", "predicted_"):
                ids = parts[f"{prefix}ids"][place, source]
                weights, best = parts[f"{prefix}weights"][place, source].topk(kept, dim=1)
                taken[f"{prefix}ids"].append(ids.gather(1, best) + copy * source_experts)
                taken[f"{prefix}weights"].append(weights)
        for name, columns in taken.items():
            out[name].append(torch.cat(columns, dim=1))
    none = torch.zeros(steps)
    predicted = torch.ones(steps, shape.layers, dtype=torch.uint8)
    predicted[:, 0] = 0
    stacked = {name: torch.stack(columns, dim=1) for name, columns in out.items()}
    return RoutingTrace(
        model=f"{shape.name}, mapped from {trace.model}",
        fingerprint=trace.fingerprint,
        num_experts=(shape.experts,) * shape.layers,
        record_bytes=(shape.expert_bytes,) * shape.layers,
        top_k=shape.top_k,
        setting={"mapped": True},
        tensors={
            "tokens": torch.ones(steps, dtype=torch.int32),
            **{name: value.to(trace.tensors[name].dtype) for name, value in stacked.items()},
            "split": torch.zeros(steps, shape.layers, dtype=torch.uint8),
            "predicted": predicted,
            "step_ms": none,
            "stall_ms": none,
            "read_ms": none,
            "read_bytes": none.long(),
        },
    )


def _source_layer(layer: int, layers: int, source_layers: int) -> int:
    """Layer 0 for layer 0, which is never predicted; the others in order, as many of each."""
    if layer == 0:
        return 0
    return 1 + (layer - 1) * (source_layers - 1) // (layers - 1)


def _decode_rows(trace: RoutingTrace) -> dict[str, Tensor]:
    """The trace's rows of steps of one token in which every layer but the first was predicted."""
    tokens, tensors = torch.tensor(trace.tokens), trace.tensors
    wanted = (tokens == 1) & tensors["predicted"][:, 1:].bool().all(dim=1)
    short = tokens <= MAX_DECODE_TOKENS
    rows = wanted.repeat_interleave(tokens)
    short_rows = wanted[short].repeat_interleave(tokens[short])
    return {
        "ids": tensors["ids"][rows].long(),
        "weights": tensors["weights"][rows],
        "predicted_ids": tensors["predicted_ids"][short_rows].long(),
        "predicted_weights": tensors["predicted_weights"][short_rows],
    }
