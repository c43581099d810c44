"""A control group with too little memory to compile: it runs from disk, or says why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specmoe_compile.bench.memory_cap import memory_cap, why_not_permitted
from tests.faults.common import ROOT
from tests.helpers import greedy, prompts, tiny_qwen3_moe

pytestmark = pytest.mark.slow

# Once everything is imported, the group is left less than a compiler and Inductor take.
LIMITED = """
import json, sys
from pathlib import Path
import torch, specmoe_compile, specmoe_compile.backend
import torch._inductor.compile_fx, transformers.generation
from specmoe_compile.system.machine import available_ram_bytes
from tests.helpers import greedy, prompts
folder, checkpoint, limit = sys.argv[1:4]
Path(limit).write_text(str((4 << 30) - available_ram_bytes() + (448 << 20)))
model = specmoe_compile.from_pretrained(
    checkpoint, device="cpu", expert_cache="40%", store_dir=f"{folder}/store", progress=False
)
tokens = greedy(model, prompts(1, 5), 8).tolist()
try:
    greedy(torch.compile(model, backend="specmoe"), prompts(1, 5), 8)
    said = "compiled"
except Exception as error:
    said = str(getattr(error, "inner_exception", error))
print(json.dumps([specmoe_compile.stats(model).store, tokens, said]))
"""


@pytest.mark.skipif(why_not_permitted() is not None, reason="control groups are not permitted here")
def test_auto_is_not_killed_where_nothing_can_be_compiled(tmp_path: Path) -> None:
    # Experts of 384 KiB: large enough for the C++ engine, and for a kernel by Inductor without it.
    plain = tiny_qwen3_moe(moe_intermediate_size=512)
    plain.save_pretrained(tmp_path / "model")
    with memory_cap(4 << 30) as cap:
        limit = "memory.limit_in_bytes" if cap.version == 1 else "memory.max"
        script = [str(tmp_path), str(tmp_path / "model"), str(cap.folder / limit)]
        done = subprocess.run(
            cap.wrap([sys.executable, "-c", LIMITED, *script]),
            cwd=ROOT,
            env={
                **os.environ,
                "XDG_CACHE_HOME": str(tmp_path / "cache"),
                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert not cap.was_killed()
    assert done.returncode == 0, done.stderr[-3000:]
    store, tokens, said = json.loads(done.stdout.splitlines()[-1])
    assert store == "disk"
    assert tokens == greedy(plain, prompts(1, 5), 8).tolist()
    assert said.startswith("Compiling takes about 512.0 MiB of RAM")
    assert "torch.mm computes the experts" in done.stderr
