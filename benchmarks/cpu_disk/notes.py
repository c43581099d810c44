"""The words of docs/results/log/cpu-disk.md: how to read it, and why a peer wins where it does."""

from __future__ import annotations

from collections.abc import Mapping

PEER_REASONS: Mapping[str, str] = {
    "mmap": "the page cache keeps what was read without copying it",
    "llama_cpp": "its process is small, so that the same limit leaves it a larger cache; C++"
    " throughout, no Python between layers",
    "accelerate": "its files are in the page cache",
    "accelerate_auto": "its files are in the page cache",
    "accelerate_cpu": "everything is in memory",
    "eager": "everything is in memory",
}
"""By arm; printed only where the peer was faster."""

NOTES = """## How to read this

- `eager` is the unmodified model in memory. `accelerate` is Hugging Face `device_map` offload with
  every decoder layer on disk, `accelerate_auto` the same with `device_map="auto"` and as much
  memory as the expert cache, `accelerate_cpu` with every layer in RAM, which on a CPU is where it
  computes.
- `mmap` is the unmodified model, every parameter mapped from a safetensors file of the packed
  weights: the operating system's page cache is its expert cache. `llama_cpp` is llama.cpp through
  llama-cpp-python, mapped from a GGUF of the same weights in float32, keys and values in float32.
  It comes with `make peers`, which compiles it.
- `on_demand` is specmoe without a cache; `cache` has one and does not predict; `specmoe` predicts
  where `auto_off` lets it. `always` keeps predicting where it does not pay.
- The limit holds for all that a process uses: `llama_cpp` needs no Python model and no PyTorch, and
  has their memory as page cache. That is an advantage on a model as small as this one."""
