"""Held-out loss and next-layer expert recall of the reference model.

Shapes: B windows, W tokens per window, T = B * W tokens, E experts, K top-k, H hidden, L layers.

Predictors of the experts of layer l + 1, from what layer l knows before its experts ran:

    residual         router_{l+1}(norm_{l+1}(r_l))
    default_vectors  router_{l+1}(norm_{l+1}(q_l)),  q_l = r_l + sum_k w_k d[l, e_k]
    previous_token   the experts of layer l + 1 at the token before

r_l is the residual that the post-attention norm of layer l reads and d[l, e] the mean output of
expert e of layer l over the tokens that were routed to it. No attention of layer l + 1 is applied.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.reference_model.data import (
    HELD_OUT_FILES,
    default_source,
    held_out_windows,
    read_training_tokens,
    sample_starts,
    training_files,
)
from benchmarks.reference_model.tokenizer import PAD_ID
from specmoe_compile.reference_model import CHECKPOINT_DIR

WINDOW = 512
CALIBRATION_WINDOWS = 256
CALIBRATION_SEED = 1234
PREDICTORS = ("residual", "default_vectors", "previous_token")


@dataclass(slots=True)
class LayerTrace:
    """What one forward pass showed of each layer; every list has L entries.

    residual: r, [B, W, H]. inputs: what the experts read, [T, H]. ids: [T, K] int64.
    weights: [T, K].
    """

    residual: list[torch.Tensor] = field(default_factory=list)
    inputs: list[torch.Tensor] = field(default_factory=list)
    ids: list[torch.Tensor] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)


@contextlib.contextmanager
def trace_layers(model: PreTrainedModel) -> Iterator[LayerTrace]:
    """Record residuals, expert inputs and routing of the forward passes run inside."""
    trace = LayerTrace()

    def keep_residual(_module: Any, args: tuple[torch.Tensor]) -> None:
        trace.residual.append(args[0])

    def keep_experts(_module: Any, args: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        trace.inputs.append(args[0])
        trace.ids.append(args[1])
        trace.weights.append(args[2])

    handles = []
    for layer in model.model.layers:
        handles.append(layer.post_attention_layernorm.register_forward_pre_hook(keep_residual))
        handles.append(layer.mlp.experts.register_forward_pre_hook(keep_experts))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _expert_output(experts: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """Return expert `expert` of one layer applied to x [rows, H], unweighted."""
    gate, up = functional.linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
    return functional.linear(experts.act_fn(gate) * up, experts.down_proj[expert])


@torch.no_grad()
def compute_default_vectors(
    model: PreTrainedModel, windows: torch.Tensor, batch: int
) -> torch.Tensor:
    """Return the mean output of every expert over the tokens routed to it.

    Args:
        model: the model, in evaluation mode.
        windows: [N, W] int64 token ids on the model's device.
        batch: windows per forward pass.

    Returns:
        float32 [L, E, H] on the model's device; zero for an expert that no token chose.
    """
    layers = model.model.layers
    shape = (len(layers), model.config.num_experts, model.config.hidden_size)
    sums = torch.zeros(shape, dtype=torch.float32, device=windows.device)
    counts = torch.zeros(shape[:2], dtype=torch.float32, device=windows.device)
    for chunk in windows.split(batch):
        with trace_layers(model) as trace:
            model.model(input_ids=chunk, use_cache=False)
        for index, layer in enumerate(layers):
            for expert in range(shape[1]):
                rows = trace.inputs[index][(trace.ids[index] == expert).any(dim=-1)]
                output = _expert_output(layer.mlp.experts, expert, rows)
                sums[index, expert] += output.float().sum(dim=0)
                counts[index, expert] += rows.shape[0]
    return sums / counts.clamp(min=1).unsqueeze(-1)


def _recall(predicted: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Return the share of `true` [..., K] that `predicted` [..., K] names, per token [...]."""
    return (true.unsqueeze(-1) == predicted.unsqueeze(-2)).any(dim=-1).float().mean(dim=-1)


def _recall_of_layer(
    model: PreTrainedModel, trace: LayerTrace, vectors: torch.Tensor, index: int
) -> dict[str, torch.Tensor]:
    """Return per predictor the recall per token of layer `index` + 1, [B, W] each."""
    layer = model.model.layers[index + 1]
    residual = trace.residual[index]
    batch, width, _ = residual.shape
    true = trace.ids[index + 1].view(batch, width, -1)
    ids, weights = trace.ids[index], trace.weights[index]
    blend = (vectors[index][ids] * weights.float().unsqueeze(-1)).sum(dim=1)
    quasi = residual + blend.view_as(residual).to(residual.dtype)
    scores = {}
    for name, state in (("residual", residual), ("default_vectors", quasi)):
        predicted = layer.mlp.gate(layer.post_attention_layernorm(state))[2].view_as(true)
        scores[name] = _recall(predicted, true)
    # The first token of a window has no predecessor: it does not count for this predictor.
    scores["previous_token"] = _recall(true[:, :-1], true[:, 1:])
    return scores


@torch.no_grad()
def evaluate_model(
    model: PreTrainedModel,
    held_out: torch.Tensor,
    calibration: torch.Tensor,
    *,
    batch: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure held-out loss, recall of the three predictors and the use of the experts.

    Args:
        model: the model, on any device.
        held_out: [N, W + 1] int64 windows, padding where a text ended.
        calibration: [M, W] int64 windows of training text for the default vectors.
        batch: windows per forward pass.

    Returns:
        `held_out_nats_per_byte`, `held_out_bytes`, `recall_at_k` (predictor -> layers 1..L-1) and
        `expert_load` (per layer, share of the most and least used expert times E; 1 is even).
    """
    model.eval()
    device = next(model.parameters()).device
    vectors = compute_default_vectors(model, calibration.to(device), batch)
    layers, experts = model.config.num_hidden_layers, model.config.num_experts
    loss, num_targets = 0.0, 0
    sums = {name: [0.0] * (layers - 1) for name in PREDICTORS}
    counts = dict.fromkeys(PREDICTORS, 0)
    load = torch.zeros(layers, experts, device=device)
    for windows in tqdm(held_out.split(batch), desc="evaluate", unit="batch", disable=not progress):
        inputs, targets = windows[:, :-1].to(device), windows[:, 1:].to(device)
        valid = targets != PAD_ID
        with trace_layers(model) as trace:
            logits = model(input_ids=inputs, use_cache=False).logits.float()
        losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        loss += float(losses[valid].double().sum())
        num_targets += int(valid.sum())
        for index in range(layers):
            ids = trace.ids[index].view(*valid.shape, -1)
            load[index] += torch.bincount(ids[valid].flatten(), minlength=experts)
        for index in range(layers - 1):
            for name, scores in _recall_of_layer(model, trace, vectors, index).items():
                sums[name][index] += float(scores[valid[:, -scores.shape[1] :]].double().sum())
        counts["residual"] += int(valid.sum())
        counts["default_vectors"] += int(valid.sum())
        counts["previous_token"] += int(valid[:, 1:].sum())
    share = load / load.sum(dim=1, keepdim=True) * experts
    return {
        "held_out_nats_per_byte": loss / num_targets,
        "held_out_bytes": num_targets,
        "recall_at_k": {name: [v / counts[name] for v in values] for name, values in sums.items()},
        "expert_load": {
            "most": share.max(dim=1).values.tolist(),
            "least": share.min(dim=1).values.tolist(),
        },
    }


def calibration_windows(tokens: torch.Tensor, window: int = WINDOW) -> torch.Tensor:
    """Return the fixed training windows [256, W] int64 that default vectors are computed from."""
    starts = sample_starts(
        tokens.numel(), window=window, steps=1, batch=CALIBRATION_WINDOWS, seed=CALIBRATION_SEED
    )[0]
    return torch.stack([tokens[start : start + window] for start in starts.tolist()]).long()


def measurement_record(dtype: str) -> dict[str, Any]:
    """Return how `evaluate_model` was applied, to be stored with what it measured."""
    return {
        "dtype": dtype,
        "window": WINDOW,
        "held_out_files": list(HELD_OUT_FILES),
        "calibration_windows": CALIBRATION_WINDOWS,
    }


def format_metrics(metrics: dict[str, Any]) -> str:
    """Return the measured loss and recall as lines of text."""
    lines = [f"held-out loss {metrics['held_out_nats_per_byte']:.4f} nats/byte"]
    for name, values in metrics["recall_at_k"].items():
        lines.append(f"recall@4 {name:<16}" + " ".join(f"{value:.3f}" for value in values))
    for name, values in metrics["expert_load"].items():
        lines.append(f"load {name:<20}" + " ".join(f"{value:.2f}" for value in values))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a stored checkpoint in float32 and write `metrics.json` beside its weights."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks evaluate", description=main.__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT_DIR)
    parser.add_argument("--source", type=Path, default=None, help="standard library folder")
    parser.add_argument("--batch", type=int, default=16, help="windows per forward pass")
    parser.add_argument("--out", type=Path, default=None, help="where metrics.json goes")
    args = parser.parse_args(argv)
    source = args.source or default_source()
    training = json.loads((args.checkpoint / "training.json").read_text())
    files = training_files(source, include_tests=training["include_tests"])
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    metrics = evaluate_model(
        model,
        held_out_windows(source, WINDOW),
        calibration_windows(read_training_tokens(files)),
        batch=args.batch,
    )
    metrics |= measurement_record("float32")
    out = args.out or args.checkpoint / "metrics.json"
    out.write_text(json.dumps(metrics, indent=2) + "\n")
    print(format_metrics(metrics))
    return 0
