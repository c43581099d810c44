"""Train the reference model from the Python standard library's sources.

    python -m benchmarks train --out DIR --device cuda

Shapes: B windows, W tokens per window, T = B * W tokens, E experts, K top-k, H hidden.

Weights live in the training dtype (bfloat16 on CUDA, float32 on the CPU); the optimizer keeps
float32 masters of them. The data order and the initial weights are functions of the seed.
"""

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from benchmarks.kit.command import run_parser
from benchmarks.reference_model.data import (
    default_source,
    held_out_windows,
    read_training_tokens,
    sample_starts,
    training_files,
)
from benchmarks.reference_model.evaluate import (
    WINDOW,
    calibration_windows,
    evaluate_model,
    format_metrics,
    measurement_record,
)
from benchmarks.reference_model.tokenizer import EOS_ID, PAD_ID, VOCAB_SIZE, build_tokenizer

MAX_POSITIONS = 4096
PROBE_FROM, PROBE_TO = 10, 40  # steps whose speed decides how many fit into --max-seconds
TIME_MARGIN = 0.92


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """What a training run depends on besides the text.

    steps: optimizer steps planned. batch: windows per step. window: tokens per window.
    seed: initial weights and data order. aux: weight of the load-balance loss.
    learning_rate: peak, reached after `warmup` steps, then cosine to a twentieth of it.
    embedding_std: initial standard deviation of the embedding. branch_scale: factor on the initial
    weights that write into the residual stream (attention output, experts' down projection).
    router_rate: factor on the routers' learning rate. embedding_gain: factor on the input
    embedding, applied to the stored weights after training.
    """

    steps: int = 1500
    batch: int = 16
    window: int = WINDOW
    seed: int = 6
    aux: float = 0.001
    learning_rate: float = 3e-3
    warmup: int = 150
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    embedding_std: float = 0.02
    branch_scale: float = 1.0
    router_rate: float = 0.3
    embedding_gain: float = 1.0
    include_tests: bool = False


def build_config() -> Qwen3MoeConfig:
    """Return the configuration: 8 layers, 32 experts of which 4 run, 6.75 M parameters."""
    return Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim is declared nowhere
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


@torch.no_grad()
def build_model(options: TrainingOptions) -> Any:
    """Return the model with its initial weights, float32 on the CPU.

    A large embedding and small branches were tried, to keep early layers predictable: they cost
    more loss than they gained recall. Slow routers (`router_rate`) did gain recall.
    """
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_config(build_config(), dtype=torch.float32)
    model.model.embed_tokens.weight.normal_(std=options.embedding_std)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(options.branch_scale)
        layer.mlp.experts.down_proj.mul_(options.branch_scale)
    return model


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Return the share of the peak rate at `step`: linear warm-up, then cosine to 1/20."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def balance_loss(logits: list[torch.Tensor], ids: list[torch.Tensor]) -> torch.Tensor:
    """Return the mean over layers of E * sum_e f_e P_e; 1 when the load is even.

    f_e is the share of assignments that went to expert e and P_e its mean router probability,
    per layer ("Switch Transformers", arXiv 2101.03961, equation 4, for top-k).

    Args:
        logits: per layer [T, E]. ids: per layer [T, K] int64.
    """
    losses = []
    for layer_logits, layer_ids in zip(logits, ids, strict=True):
        experts = layer_logits.shape[-1]
        probabilities = layer_logits.float().softmax(dim=-1).mean(dim=0)
        chosen = torch.zeros_like(layer_logits).scatter_(1, layer_ids, 1.0)
        share = chosen.float().mean(dim=0) / layer_ids.shape[-1]
        losses.append(experts * (share * probabilities).sum())
    return torch.stack(losses).mean()


class Trainer:
    """One training run: model, float32 masters, optimizer and data."""

    def __init__(self, options: TrainingOptions, tokens: torch.Tensor, device: torch.device):
        """Build the model from the seed and move the text [tokens] int16 to the device."""
        self.options = options
        self.device = device
        model = build_model(options)
        self.masters = [parameter.detach().clone().to(device) for parameter in model.parameters()]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = model.to(device=device, dtype=dtype).train()
        self.parameters = list(self.model.parameters())
        names = [name for name, _ in self.model.named_parameters()]
        named = list(zip(names, self.masters, strict=True))
        routers = [m for name, m in named if name.endswith("mlp.gate.weight")]
        decayed = [m for name, m in named if m.ndim > 1 and not name.endswith("mlp.gate.weight")]
        plain = [m for m in self.masters if m.ndim <= 1]
        decay = options.weight_decay
        self.optimizer = torch.optim.AdamW(
            [
                {"params": routers, "weight_decay": decay, "rate": options.router_rate},
                {"params": decayed, "weight_decay": decay, "rate": 1.0},
                {"params": plain, "weight_decay": 0.0, "rate": 1.0},
            ],
            lr=options.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.tokens = tokens.to(device)
        self.starts = sample_starts(
            tokens.numel(),
            window=options.window + 1,
            steps=options.steps,
            batch=options.batch,
            seed=options.seed,
        ).to(device)
        self.offsets = torch.arange(options.window + 1, device=device)
        self._logits: list[torch.Tensor] = []
        self._ids: list[torch.Tensor] = []
        for layer in self.model.model.layers:
            layer.mlp.gate.register_forward_hook(self._keep_routing)

    def _keep_routing(self, _module: Any, _args: Any, output: tuple[torch.Tensor, ...]) -> None:
        if self.model.training:
            self._logits.append(output[0])
            self._ids.append(output[2])

    def step(self, step: int, steps: int) -> torch.Tensor:
        """Take one optimizer step; return its loss in nats/byte as a device scalar (no sync)."""
        options = self.options
        rate = options.learning_rate * learning_rate_factor(step, steps, options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        window = self.tokens[self.starts[step].unsqueeze(1) + self.offsets].long()
        self._logits.clear()
        self._ids.clear()
        logits = self.model(input_ids=window[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())
        (loss + options.aux * balance_loss(self._logits, self._ids)).backward()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, options.max_grad_norm, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)
        return loss.detach()

    def train(
        self,
        max_seconds: float | None = None,
        *,
        check_every: int | None = None,
        check: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """Run the planned steps, or as many as fit into `max_seconds` at the speed measured.

        Args:
            max_seconds: time limit; the cosine ends at the last step that fits.
            check_every, check: call `check(step)` after every so many steps.

        Returns:
            `steps`, `seconds` and `loss_curve` (step, nats/byte over the last 100 steps).
        """
        steps, started = self.options.steps, time.perf_counter()
        curve, recent = [], []
        with tqdm(total=steps, desc="train", unit="step", mininterval=2.0) as bar:
            step = 0
            while step < steps:
                recent.append(self.step(step, steps))
                step += 1
                bar.update()
                if max_seconds is not None and step in (PROBE_FROM, PROBE_TO):
                    now = self._now()
                    if step == PROBE_FROM:
                        probe_started = now
                    else:
                        per_step = (now - probe_started) / (PROBE_TO - PROBE_FROM)
                        left = max_seconds * TIME_MARGIN - (now - started)
                        steps = min(steps, step + max(1, int(left / per_step)))
                        bar.total = steps
                if step % 100 == 0 or step == steps:
                    curve.append((step, round(float(torch.stack(recent).mean()), 4)))
                    recent.clear()
                    bar.set_postfix(nats_per_byte=curve[-1][1])
                if check is not None and check_every and step % check_every == 0 and step < steps:
                    check(step)
                    self.model.train()
        return {"steps": steps, "seconds": self._now() - started, "loss_curve": curve}

    def _now(self) -> float:
        """Return the time in seconds once the device has done its work (synchronises)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@torch.no_grad()
def save_checkpoint(model: PreTrainedModel, out: Path, embedding_gain: float) -> PreTrainedModel:
    """Write weights in bfloat16 (per-expert tensors), configuration and tokenizer to `out`.

    Args:
        model: the model in training; it stays as it is.
        embedding_gain: factor on the stored input embedding (the output matrix is another one). A
            larger embedding makes each layer's share of the residual stream smaller, which raises
            the recall of the next layer's experts in every layer at a small price in loss.

    Returns:
        The stored model, bfloat16, on the device of `model`.
    """
    stored: Any = AutoModelForCausalLM.from_config(build_config(), dtype=torch.bfloat16).eval()
    stored.load_state_dict(model.state_dict())
    stored.get_input_embeddings().weight.mul_(embedding_gain)
    stored.generation_config = transformers.GenerationConfig(
        eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=False, max_new_tokens=128
    )
    stored.save_pretrained(out)
    build_tokenizer(MAX_POSITIONS).save_pretrained(out)
    moved: PreTrainedModel = stored.to(model.device)
    return moved


def describe_hardware(device: torch.device) -> str:
    """Return the name of the device that trained."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    defaults = TrainingOptions()
    parser = run_parser("train", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--source", type=Path, default=None, help="standard library folder")
    parser.add_argument(
        "--source-name",
        default=f"{platform.python_implementation()} {platform.python_version()}",
        help="which Python the source folder belongs to, for the model card",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-seconds", type=float, default=None, help="train no longer than this")
    parser.add_argument("--check-every", type=int, default=None, help="steps between checkpoints")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--aux", type=float, default=defaults.aux, help="load-balance weight")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--embedding-std", type=float, default=defaults.embedding_std)
    parser.add_argument("--branch-scale", type=float, default=defaults.branch_scale)
    parser.add_argument("--router-rate", type=float, default=defaults.router_rate)
    parser.add_argument("--embedding-gain", type=float, default=defaults.embedding_gain)
    parser.add_argument("--include-tests", action="store_true", help="also read test folders")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, save, measure the saved weights."""
    args = parse_arguments(argv)
    device, source = torch.device(args.device), args.source or default_source()
    options = TrainingOptions(
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        aux=args.aux,
        learning_rate=args.learning_rate,
        embedding_std=args.embedding_std,
        branch_scale=args.branch_scale,
        router_rate=args.router_rate,
        embedding_gain=args.embedding_gain,
        include_tests=args.include_tests,
    )
    held_out = held_out_windows(source, WINDOW)
    files = training_files(source, include_tests=options.include_tests)
    tokens = read_training_tokens(files)
    print(f"{len(files)} files, {tokens.numel()} bytes of training text", flush=True)
    trainer = Trainer(options, tokens, device)
    calibration = calibration_windows(tokens)

    def check(step: int) -> None:
        """Save an intermediate checkpoint and print what a part of the text says about it."""
        folder = args.out.with_name(f"{args.out.name}-{step}")
        stored = save_checkpoint(trainer.model, folder, options.embedding_gain)
        metrics = evaluate_model(stored, held_out[::16], calibration[::16], progress=False)
        tqdm.write(f"step {step}: {format_metrics(metrics)}")

    result = trainer.train(args.max_seconds, check_every=args.check_every, check=check)
    stored = save_checkpoint(trainer.model, args.out, options.embedding_gain)
    record = asdict(options) | result
    record |= {
        "parameters": sum(parameter.numel() for parameter in trainer.parameters),
        "training_files": len(files),
        "training_bytes": tokens.numel(),
        "hardware": describe_hardware(device),
        "training_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "python_source": args.source_name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    metrics = evaluate_model(stored, held_out, calibration) | measurement_record("bfloat16")
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(f"{record['steps']} steps in {record['seconds']:.0f} s; {format_metrics(metrics)}")
    return 0
