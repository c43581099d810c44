"""Peak memory of packing, loading and decoding: `python -m tests.e2e.memory_peaks JOBS`.

JOBS is a list in JSON, of a function's name here and its arguments each. Every job runs in a fork
of its own of this process, which has imported PyTorch and transformers once for all of them, and
prints what it found as a line of JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
import types
from pathlib import Path

import torch
import transformers
from transformers.models.qwen3_moe import modeling_qwen3_moe

from specmoe_compile.api import from_pretrained, offload
from specmoe_compile.hf.attach import session_of
from specmoe_compile.runtime.store import source_content


def write(folder: str, layers: int) -> dict[str, int]:
    """Save a checkpoint with 32 experts of 3 MiB in each layer."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        dtype=torch.bfloat16,
        eos_token_id=None,
    )
    model = modeling_qwen3_moe.Qwen3MoeForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="100MB")
    return {"layers": layers}


class Late:
    """A hash whose thread gets no core: what it waits for must not pile up."""

    def __init__(self, data: bytes = b"") -> None:
        self.sha = hashlib.sha256(data)
        self.hexdigest = self.sha.hexdigest

    def update(self, data: bytes) -> None:
        time.sleep(0.01)
        self.sha.update(data)


def measure(folder: str, store_dir: str, how: str) -> dict[str, int]:
    """Load with the experts on "disk" or in "ram", or "offload" a loaded model; then generate.

    Returns:
        peaks in bytes (`imported`, `loaded`, `decoded`), and sizes: of all experts, of one layer's
        (`layer`) and of the `rest` of the model.
    """
    source_content.hashlib = types.SimpleNamespace(sha256=Late)  # type: ignore[attr-defined]
    found = {"imported": peak()}
    if how == "offload":
        model = modeling_qwen3_moe.Qwen3MoeForCausalLM.from_pretrained(folder)
        # A mapped checkpoint would count twice; loading is not what is measured here.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        found["imported"] = peak(reset=True)
        model = offload(model, device="cpu", store="ram", progress=False)
    else:
        model = from_pretrained(
            folder,
            device="cpu",
            store=how,  # type: ignore[arg-type]
            store_dir=store_dir,
            expert_cache="25%",
            progress=False,
        )
    found["loaded"] = peak()
    ids = torch.ones(1, 8, dtype=torch.int64)
    model.generate(ids, max_new_tokens=16, do_sample=False)
    found["decoded"] = peak()
    store = session_of(model).store
    found["experts"] = store.total_bytes
    found["layer"] = store.layers[0].total_bytes
    found["rest"] = model.get_memory_footprint()
    return found


def peak(*, reset: bool = False) -> int:
    """Most bytes that this process had in RAM so far, or since a reset; forks begin anew."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":") for line in lines)
    return int(fields["VmHWM"].split()[0]) * 1024


JOBS = {"write": write, "measure": measure}


def main(jobs: list[list[object]]) -> int:
    """Run each job in a fork; returns 1 once one fails."""
    for name, *arguments in jobs:
        child = os.fork()
        if child == 0:
            try:
                print(json.dumps(JOBS[str(name)](*arguments)), flush=True)  # type: ignore[operator]
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
