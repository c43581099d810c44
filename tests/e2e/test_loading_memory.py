"""Peak memory while packing, loading and decoding, measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers import PATIENCE_S

REPOSITORY = Path(__file__).parents[2]

WRITE = """
    import torch, transformers
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = transformers.Qwen3MoeConfig(
        vocab_size=256, hidden_size=512, intermediate_size=1024, moe_intermediate_size=1024,
        num_hidden_layers={layers}, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
        num_experts=32, num_experts_per_tok=4, dtype=torch.bfloat16, eos_token_id=None,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained({folder!r}, max_shard_size="100MB")
"""

MEASURE = """
    import hashlib, json, sys, time, types, torch
    import specmoe_compile
    from specmoe_compile.api import from_pretrained, offload
    from specmoe_compile.runtime.session import session_of
    from specmoe_compile.runtime.store import source_content
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    class Late:
        "A hash whose thread gets no core: what it waits for must not pile up."
        def __init__(self, data=b""):
            self.sha = hashlib.sha256(data)
            self.hexdigest = self.sha.hexdigest
        def update(self, data):
            time.sleep(0.01)
            self.sha.update(data)

    source_content.hashlib = types.SimpleNamespace(sha256=Late)

    def peak(reset=False):
        if reset:
            open("/proc/self/clear_refs", "w").write("5")
        fields = dict(line.split(":") for line in open("/proc/self/status"))
        return int(fields["VmHWM"].split()[0]) * 1024

    folder, store_dir, how = sys.argv[1:]
    out = {"imported": peak()}
    if how == "offload":
        model = modeling_qwen3_moe.Qwen3MoeForCausalLM.from_pretrained(folder)
        # A mapped checkpoint would count twice; loading is not what is measured here.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        out["imported"] = peak(reset=True)
        model = offload(model, device="cpu", store="ram", progress=False)
    else:
        model = from_pretrained(
            folder, device="cpu", store=how, store_dir=store_dir, expert_cache="25%", progress=False
        )
    out["loaded"] = peak()
    model.generate(torch.ones(1, 8, dtype=torch.int64), max_new_tokens=16, do_sample=False)
    out["decoded"] = peak()
    store = session_of(model).store
    out["experts"] = store.total_bytes
    out["layer"] = store.layers[0].total_bytes
    out["rest"] = model.get_memory_footprint()
    print(json.dumps(out))
"""


def run_python(code: str, *arguments: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of 3 MiB, 201 MB in all."""
    folder = tmp_path_factory.mktemp("memory") / "model"
    run_python(WRITE.format(layers=2, folder=str(folder)))
    return folder


def measure(checkpoint: Path, store_dir: Path, how: str) -> dict[str, int]:
    values: dict[str, int] = json.loads(
        run_python(MEASURE, str(checkpoint), str(store_dir), how).splitlines()[-1]
    )
    return values


def test_a_store_on_disk_never_holds_all_experts_in_ram(checkpoint: Path, tmp_path: Path) -> None:
    for _ in ("packs", "finds the store"):
        used = measure(checkpoint, tmp_path / "store", "disk")
        # Packing needs one expert and buffers; torch's own allocations are the rest.
        assert used["loaded"] - used["imported"] < used["rest"] + (60 << 20) < used["experts"] / 2
        cache = used["experts"] // 4
        assert used["decoded"] - used["imported"] < used["rest"] + cache + (110 << 20)


def test_a_store_in_ram_holds_them_once(checkpoint: Path, tmp_path: Path) -> None:
    used = measure(checkpoint, tmp_path / "store", "ram")
    assert used["loaded"] - used["imported"] < used["rest"] + used["experts"] + (60 << 20)


def test_offloading_to_ram_needs_one_layer_more(checkpoint: Path, tmp_path: Path) -> None:
    used = measure(checkpoint, tmp_path / "store", "offload")
    assert used["loaded"] - used["imported"] < used["layer"] + (30 << 20) < used["experts"]


@pytest.mark.slow
def test_the_promised_limit_with_805_mb_of_experts(tmp_path: Path) -> None:
    run_python(WRITE.format(layers=8, folder=str(tmp_path / "model")))
    for _ in ("packs", "finds the store"):
        used = measure(tmp_path / "model", tmp_path / "store", "disk")
        assert used["experts"] == 8 * 32 * (3 << 20)
        assert used["decoded"] < used["rest"] + used["experts"] // 4 + 700 * 10**6
