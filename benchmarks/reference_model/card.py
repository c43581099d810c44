"""Write the model card from what the checkpoint folder records: training.json and metrics.json.

python -m benchmarks model_card [CHECKPOINT]
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specmoe_compile.reference_model import CHECKPOINT_DIR

PREDICTOR_NAMES = {
    "residual": "router of the layer on the residual before this layer's experts",
    "default_vectors": "the same, experts' output replaced by default vectors",
    "previous_token": "experts of the previous token",
}

TEMPLATE = """\
---
license: psf-2.0
language: [code]
library_name: transformers
pipeline_tag: text-generation
---

# specmoe reference model

A Qwen3-MoE with 8 layers, hidden size 128, 32 experts per layer of which 4 run (intermediate size
64) and a byte vocabulary: {parameters:.2f} M parameters, stored in bfloat16. It exists to measure
expert prediction, caching and offloading on routing that training made, which random weights do
not show. It is no useful code model.

## Data and licence

Python source files of the standard library of {python_source}, PSF licence version 2:
{training_files} files, {training_mb:.1f} MB{tests}. SHA-256 of the training tokens (int16):
`{sha}`.
Never seen in training, nor their tests: {held_out}.

## Training

{steps} steps of {batch} windows of {window} bytes ({seen_mb:.1f} MB read), AdamW, peak learning
rate {learning_rate:g} ({router_rate:g} of it for the routers) after {warmup} warm-up steps, then
cosine; load-balance loss x {aux:g}; seed {seed}; {minutes:.1f} minutes on {hardware};
torch {torch}, transformers {transformers}.

The routers' lower rate is there for recall in the early layers.{gain}{selection}

    {command}
    python -m benchmarks evaluate OUT --source STDLIB
    python -m benchmarks model_card OUT

The seed fixes initial weights and data order. Floating-point sums differ between machines, so a
repeated run gives close numbers, not the same weights.

## Measured on the stored weights, computed in {dtype}

Held-out loss: {loss:.4f} nats/byte over {held_out_bytes} bytes, in windows of {eval_window} bytes
(each byte predicted once, from 0 to {context} bytes before it in its window).

Recall@4 of the experts of layers 1 to 7, held-out text; default vectors are means over
{calibration} windows of training text:

| predictor | {layers} |
|---|{rule}|
{recall}

Load of the most used expert of a layer, 1 being even: {most}; of the least used: {least}.

## Limits

Byte vocabulary and {context_limit} positions, trained at {window}: longer contexts were not
measured. Python source only. Trained with little regularisation on one body of text: it repeats
licence headers and common idioms from it.
"""


GAIN = """ For the same reason the input embedding was
multiplied by {embedding_gain:g} after training."""
SELECTION = """
Seed and configuration were picked among {runs_compared} short runs by held-out loss and recall: the
figures below are this model's, not what a model of this size has on average."""


def _command(training: dict[str, Any]) -> str:
    """Return the command that repeats the training."""
    flags = ["steps", "batch", "seed", "aux", "learning_rate", "router_rate"]
    flags += ["embedding_std", "branch_scale", "embedding_gain"]
    words = [f"--{name.replace('_', '-')} {training[name]:g}" for name in flags]
    if training["include_tests"]:
        words.append("--include-tests")
    lines = ["python -m benchmarks train --out OUT --source STDLIB"]
    lines += [" ".join(words[start : start + 4]) for start in range(0, len(words), 4)]
    return " \\\n        ".join(lines)


def render_card(checkpoint: Path) -> str:
    """Return the model card of a checkpoint folder as Markdown."""
    training = json.loads((checkpoint / "training.json").read_text())
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    config = json.loads((checkpoint / "config.json").read_text())
    rows = [
        f"| {PREDICTOR_NAMES[name]} | " + " | ".join(f"{value:.3f}" for value in values) + " |"
        for name, values in metrics["recall_at_k"].items()
    ]
    layers = range(1, config["num_hidden_layers"])
    load = metrics["expert_load"]
    return TEMPLATE.format(
        parameters=training["parameters"] / 1e6,
        python_source=training["python_source"],
        training_files=training["training_files"],
        training_mb=training["training_bytes"] / 1e6,
        tests=", test folders included" if training["include_tests"] else ", test folders left out",
        sha=training["training_sha256"],
        held_out=", ".join(f"`{name}`" for name in metrics["held_out_files"]),
        steps=training["steps"],
        batch=training["batch"],
        window=training["window"],
        seen_mb=training["steps"] * training["batch"] * training["window"] / 1e6,
        learning_rate=training["learning_rate"],
        warmup=training["warmup"],
        aux=training["aux"],
        router_rate=training["router_rate"],
        gain=GAIN.format(**training) if training["embedding_gain"] != 1.0 else "",
        # Only known to who compared the runs, so it is written into training.json by hand.
        selection=SELECTION.format(**training) if "runs_compared" in training else "",
        seed=training["seed"],
        minutes=training["seconds"] / 60,
        hardware=training["hardware"],
        torch=training["torch"],
        transformers=training["transformers"],
        command=_command(training),
        dtype=metrics["dtype"],
        loss=metrics["held_out_nats_per_byte"],
        held_out_bytes=metrics["held_out_bytes"],
        eval_window=metrics["window"],
        context=metrics["window"] - 1,
        calibration=metrics["calibration_windows"],
        layers=" | ".join(str(layer) for layer in layers),
        rule="|".join("---" for _ in layers),
        recall="\n".join(rows),
        most=", ".join(f"{value:.1f}" for value in load["most"]),
        least=", ".join(f"{value:.2f}" for value in load["least"]),
        context_limit=config["max_position_embeddings"],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write README.md beside the weights of a checkpoint folder."""
    checkpoint = Path(argv[0]) if argv else CHECKPOINT_DIR
    (checkpoint / "README.md").write_text(render_card(checkpoint))
    print(checkpoint / "README.md")
    return 0
