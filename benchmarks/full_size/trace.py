"""Trace-driven routing: the reference model's routing, mapped onto a larger model's layers.

Random weights route at random, and prove nothing about caches and predictions. So the routers of a
random model of full size are told what to choose by a trace of the trained reference model: its
true choices, and what its own lookahead router predicted for them, token by token, on text that
its training never saw.

The mapping: E / 32 independent texts stand side by side, each with 32 experts of the target layer,
and the target's K are the heaviest of theirs. Target layers take the reference's layers 1..7 in
turn (0 for the first: it is the one without a prediction), each turn with other texts.

Shape letters: R reference layers, S texts, N tokens, L target layers, E experts, K top-k.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import specmoe_compile
from benchmarks.reference_model.data import default_source, held_out_windows
from specmoe_compile.calibrate.layer_probe import LayerProbe
from specmoe_compile.hf.attach import session_of
from specmoe_compile.reference_model import CHECKPOINT_DIR

TRUE, PREDICTED = 0, 1
SKIPPED_TOKENS = 32  # the first tokens of a text route without context
CALIBRATION_WINDOWS = 16
_UNIFORM_LAYERS, _UNIFORM_TOKENS, _UNIFORM_EXPERTS = 48, 122, 128
ABSENT = -20.0  # log weight of an expert that was not chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTrace:
    """What the reference model routed and predicted.

    Attributes:
        ids, weights: true choices, [R, S, N, K] int64 and float32.
        predicted_ids, predicted_weights: of the lookahead router, the same; -1 and 0 in layer 0.
        experts: E of the reference model.
    """

    ids: Tensor
    weights: Tensor
    predicted_ids: Tensor
    predicted_weights: Tensor
    experts: int

    @property
    def digest(self) -> str:
        """Names the trace."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        tensors = {
            name: getattr(self, name).contiguous()
            for name in ("ids", "weights", "predicted_ids", "predicted_weights")
        }
        save_file(tensors, path, metadata={"experts": str(self.experts)})

    @classmethod
    def load(cls, path: Path, experts: int = 32) -> RoutingTrace:
        """Read what `save` wrote."""
        return cls(**load_file(path), experts=experts)


class _Recorder(LayerProbe):
    """A layer probe that keeps every choice and prediction."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.true: dict[int, tuple[Tensor, Tensor]] = {}
        self.guessed: dict[int, tuple[Tensor, Tensor]] = {}

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, layer: int) -> Tensor:
        self.true[layer] = (ids.clone(), weights.clone())
        return super().experts(x, ids, weights, layer)

    def predict(self, ids: Tensor, weights: Tensor, layer: int) -> None:
        self.guessed[layer] = (ids.clone(), weights.clone())
        super().predict(ids, weights, layer)


@torch.no_grad()
def record_reference(texts: int, tokens: int) -> RoutingTrace:
    """Run the reference model over held-out text, on the CPU.

    Args:
        texts: S.
        tokens: N.

    Raises:
        ValueError: the held-out text is too short.
    """
    window = SKIPPED_TOKENS + tokens
    windows = held_out_windows(default_source(), window)[:, :window]
    windows = windows[(windows < 256).all(dim=1)]  # whole windows, no padding
    if len(windows) < texts + CALIBRATION_WINDOWS:
        raise ValueError(
            f"The held-out text has {len(windows)} windows of {window} tokens; a trace of {texts}"
            f" texts needs {texts + CALIBRATION_WINDOWS}: ask for fewer tokens."
        )
    # Spread over all files; those that the default vectors come from are others.
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    chosen, calibration = windows[order[:texts]], windows[order[texts:]][:CALIBRATION_WINDOWS]
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT_DIR, dtype=torch.float32).eval()
    specmoe_compile.offload(model, device="cpu", store="ram", progress=False)
    torch._dynamo.reset()
    try:
        probe = _Recorder(model, session_of(model))
        probe.run(calibration)
        probe.vectors, probe.learns = probe.means(), False
        probe.run(chosen)
    finally:
        specmoe_compile.close(model)
        torch._dynamo.reset()
    return _collected(probe, texts, window, model.config.num_experts)


def _collected(probe: _Recorder, texts: int, window: int, experts: int) -> RoutingTrace:
    def rows(value: Tensor) -> Tensor:
        return value.view(texts, window, -1)[:, SKIPPED_TOKENS:]

    layers = range(len(probe.true))
    missing = [layer for layer in layers if layer and layer not in probe.guessed]
    if missing:
        raise ValueError(f"The reference model's layers {missing} were not predicted.")
    nobody = (torch.full_like(probe.true[0][0], -1), torch.zeros_like(probe.true[0][1]))
    guessed = {0: nobody, **probe.guessed}
    return RoutingTrace(
        ids=torch.stack([rows(probe.true[layer][0]) for layer in layers]).long(),
        weights=torch.stack([rows(probe.true[layer][1]) for layer in layers]).float(),
        predicted_ids=torch.stack([rows(guessed[layer][0]) for layer in layers]).long(),
        predicted_weights=torch.stack([rows(guessed[layer][1]) for layer in layers]).float(),
        experts=experts,
    )


def texts_needed(
    layers: int, experts: int, *, reference_layers: int, reference_experts: int
) -> int:
    """S that a target of L layers and E experts takes."""
    turns = -(-(layers - 1) // (reference_layers - 1))
    return turns * (experts // reference_experts)


def map_trace(trace: RoutingTrace, *, layers: int, experts: int, top_k: int) -> Tensor:
    """Router logits that make the target route as the trace says.

    Args:
        trace: of the reference model.
        layers, experts, top_k: L, E and K of the target.

    Returns:
        [L, N, 2, E] float32, at 2 the true and the predicted logits.

    Raises:
        ValueError: the trace is too small for the target, or does not divide it.
    """
    reference, texts, tokens, chosen = trace.ids.shape
    blocks, rest = divmod(experts, trace.experts)
    turns = -(-(layers - 1) // (reference - 1))
    if rest or blocks * chosen < top_k or turns * blocks > texts:
        raise ValueError(
            f"A trace of {texts} texts, {trace.experts} experts and top-{chosen} does not map onto"
            f" {layers} layers of {experts} experts, top-{top_k}: experts must be a multiple of"
            f" {trace.experts}, and {turns * blocks} texts are needed."
        )
    tables = torch.full((layers, tokens, 2, experts), ABSENT)
    for layer in range(layers):
        turn, source = (0, 0) if layer == 0 else divmod(layer - 1, reference - 1)
        source += 1 if layer else 0
        for block in range(blocks):
            part = tables[layer, :, :, block * trace.experts : (block + 1) * trace.experts]
            text = turn * blocks + block
            part[:, TRUE].scatter_(
                1, trace.ids[source, text], trace.weights[source, text].clamp(min=1e-6).log()
            )
            if source:
                part[:, PREDICTED].scatter_(
                    1,
                    trace.predicted_ids[source, text],
                    trace.predicted_weights[source, text].clamp(min=1e-6).log(),
                )
    return tables


def near_uniform_tables(layers: int, tokens: int, experts: int, top_k: int) -> Tensor:
    """Router logits of a routing that a cache has little of: [L, N, 2, E] float32, by a seed.

    Each expert of a layer has a weight of its own that all tokens share, half as strong as what
    each token draws anew. What is predicted is the former: nothing of the token is known ahead.

    Raises:
        ValueError: it is drawn for fewer layers, tokens or experts.
    """
    most = _UNIFORM_LAYERS, _UNIFORM_TOKENS, _UNIFORM_EXPERTS
    if any(n > m for n, m in zip((layers, tokens, experts), most, strict=True)):
        raise ValueError(
            f"The near-uniform routing has {most[0]} layers, {most[1]} tokens and {most[2]}"
            f" experts, and {layers}, {tokens} and {experts} are asked for: take fewer."
        )
    # Drawn in one size, so that other systems' runs of other shapes have the same table.
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(most[0], 1, most[2], generator=generator)
    drawn = torch.randn(*most, generator=generator)
    base, drawn = base[:layers, :, :experts], drawn[:layers, :tokens, :experts]
    tables = torch.full((layers, tokens, 2, experts), ABSENT)
    strengths = 4.0 - 0.25 * torch.arange(top_k)
    for which, logits in ((TRUE, 0.5 * base + drawn), (PREDICTED, base.expand_as(drawn))):
        chosen = logits.topk(top_k, dim=-1).indices
        tables[:, :, which].scatter_(2, chosen, strengths.expand(chosen.shape).contiguous())
    return tables


def describe_tables(tables: Tensor, top_k: int) -> Mapping[str, Any]:
    """What mapped tables hold: recall per layer, and share of the previous token's experts.

    Args:
        tables: from `map_trace`.
        top_k: K of the target.
    """
    true, predicted = (tables[:, :, which].topk(top_k, dim=-1).indices for which in (0, 1))
    recall = _share(true, predicted)[1:]
    reuse = _share(true[:, 1:], true[:, :-1])
    distinct = torch.tensor([layer.unique().numel() for layer in true]).float()
    return {
        "routing": "trace-driven routing (reference model's trace, mapped)",
        "tokens": tables.shape[1],
        "recall": [round(float(value), 4) for value in recall],
        "recall_mean": float(recall.mean()),
        "previous_token_mean": float(reuse.mean()),
        "distinct_experts_mean": float(distinct.mean()),
    }


def _share(wanted: Tensor, found: Tensor) -> Tensor:
    """Share of the wanted ids that were found, [L, N, K], [L, N, K] -> [L]."""
    return (wanted.unsqueeze(3) == found.unsqueeze(2)).any(dim=3).float().mean(dim=(1, 2))
