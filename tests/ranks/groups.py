"""Scenarios of several ranks, and what came of them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.ranks.groups import NO_MULTICAST

ROOT = Path(__file__).parents[2]
WORKER = str(Path(__file__).with_name("worker.py"))
SUM_WORKER = str(Path(__file__).with_name("sum_worker.py"))
LAYERS, EXPERTS, TOP_K = 2, 8, 2
ALPHABET = "abcdefghijklmnopqrstuvwxyz "

needs_expert_parallel = pytest.mark.skipif(
    importlib.util.find_spec("transformers.distributed.expert_parallel") is None,
    reason="this transformers cannot split experts over ranks",
)


@dataclass(frozen=True)
class Group:
    """How the ranks of a scenario ended: by rank, exit statuses, results and error texts."""

    statuses: list[Any]
    results: list[dict[str, Any]]
    errors: list[str]

    @classmethod
    def read(cls, folder: Path) -> Group:
        """What `tests.ranks.launch` left in a scenario's folder."""
        statuses = json.loads((folder / "status.json").read_text())
        files = [folder / f"rank{rank}.json" for rank in range(len(statuses))]
        results = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        errors = [file.with_suffix(".err").read_text() for file in files]
        return cls(statuses, results, errors)

    def checked(self) -> list[dict[str, Any]]:
        """The results, after a look at the statuses."""
        assert all(status == 0 for status in self.statuses), "\n".join(
            [str(self.statuses), *(text[-3000:] for text in self.errors)]
        )
        return self.results


def environment() -> dict[str, str]:
    """For a process that imports this checkout, computes on one thread and asks no hub."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **NO_MULTICAST}
    return {**os.environ, **more}


def run_groups(out: Path, checkpoint: Path, scenarios: list[dict[str, Any]]) -> dict[str, Group]:
    """Run scenarios one after the other; returns them by name."""
    given = [
        {"checkpoint": str(checkpoint), "store_dir": str(out / f"{each['name']}.store"), **each}
        for each in scenarios
    ]
    (out / "scenarios.json").write_text(json.dumps(given))
    command = [sys.executable, "-m", "tests.ranks.launch", str(out)]
    ended = finished(command)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return {each["name"]: Group.read(out / each["name"]) for each in scenarios}


def torchrun(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Start a script or a module by torchrun, on a port that it finds, and wait for its end."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return finished([sys.executable, *launch, *arguments])


def finished(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, however long that takes."""
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)


def save_letters(folder: Path) -> None:
    """Give a checkpoint a tokenizer of small letters and spaces, ids 2 to 28."""
    letters = {"?": 0, "!": 1, **{letter: 2 + n for n, letter in enumerate(ALPHABET)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(letters, [])))
    tokenizer.save_pretrained(folder)


def save_checkpoint(folder: Path, **changes: Any) -> Path:
    """A tiny model of 8 experts per layer, in float32."""
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 32,
            "moe_intermediate_size": 32,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            **changes,
        }
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder
