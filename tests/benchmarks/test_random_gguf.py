"""GGUF files of random weights: full shapes, whole blocks, and what llama.cpp reads of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from benchmarks.full_size import random_gguf
from benchmarks.full_size.model import SHAPES
from benchmarks.full_size.random_gguf import (
    FORMATS,
    STD,
    expert_bytes_of_layers,
    random_block,
    tensors,
    write_gguf,
)

CELLS = [
    ("tiny-qwen3", "q4_0"),
    ("tiny-qwen3", "bf16"),
    ("tiny-gpt-oss", "mxfp4"),
    ("tiny-deepseek", "q8_0"),
]
LITE = ("tiny-deepseek", "q8_0", 27)
"""So many layers tell llama.cpp that queries have no latent."""
needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("gguf") is None, reason="needs the extra peers: gguf"
)


@pytest.mark.parametrize(
    ("model", "form", "gigabytes", "experts"),
    [
        ("Qwen3-30B-A3B", "bf16", 61.1, 58.0),
        ("Qwen3-30B-A3B", "q4_0", 17.3, 16.3),
        ("GPT-OSS-20B", "mxfp4", 12.1, 10.2),
        ("DeepSeek-V2-Lite", "q8_0", 16.7, 15.3),
    ],
)
def test_full_shapes_have_the_bytes_of_published_files(
    model: str, form: str, gigabytes: float, experts: float
) -> None:
    config = SHAPES[model].configured()
    found = list(tensors(config, form))
    assert round(sum(tensor.bytes for tensor in found) / 1e9, 1) == gigabytes
    assert round(sum(expert_bytes_of_layers(config, form)) / 1e9, 1) == experts
    assert all(tensor.shape[-1] % tensor.kind.values == 0 for tensor in found)
    assert len({tensor.name for tensor in found}) == len(found)


@pytest.mark.parametrize("kind", sorted({k for f in FORMATS.values() for k in f}, key=str))
def test_a_random_block_is_whole_and_no_larger_than_it_says(kind: random_gguf.Kind) -> None:
    block = random_block(kind)
    assert len(block) % kind.bytes == 0 and len(block) <= random_gguf.BLOCK_BYTES
    assert len(set(block[: 64 * kind.bytes])) > 32, "random, not one value"


@needs_gguf
@pytest.mark.parametrize(("model", "form"), CELLS)
def test_the_package_reads_what_was_written(tmp_path: Path, model: str, form: str) -> None:
    import gguf

    config, path = SHAPES[model].configured(), tmp_path / "model.gguf"
    size = write_gguf(path, config, form)
    assert path.stat().st_size == size and not list(tmp_path.glob("*.part"))
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert list(found) == [tensor.name for tensor in tensors(config, form)]
    assert reader.fields["tokenizer.ggml.model"].contents() == "no_vocab"
    assert bool((found["output_norm.weight"].data == 1).all())
    for name in ("blk.1.ffn_down_exps.weight", "blk.0.attn_q.weight", "output.weight"):
        part = found[name]
        values = gguf.quants.dequantize(part.data, part.tensor_type)
        assert abs(float(np.mean(values))) < STD / 4, name
        assert STD / 2 < float(np.std(values)) < 2 * STD, name
    written = path.stat().st_mtime_ns
    assert write_gguf(path, config, form) == size and path.stat().st_mtime_ns == written


@needs_gguf
@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs the extra peers")
@pytest.mark.parametrize(("model", "form", "layers"), [*((*c, None) for c in CELLS), LITE])
def test_llama_cpp_computes_with_it(
    tmp_path: Path, model: str, form: str, layers: int | None
) -> None:
    import llama_cpp

    config = SHAPES[model].configured(layers)
    path = tmp_path / "model.gguf"
    write_gguf(path, config, form)
    found = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    found.eval([1, 2, 3])
    scores = found.scores[:3]
    assert scores.shape == (3, config.vocab_size)
    assert bool(np.isfinite(scores).all()) and float(scores.std()) > 0


@needs_gguf
def test_an_unknown_format_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no GGUF of qwen3_moe in q3_k"):
        write_gguf(tmp_path / "x.gguf", SHAPES["tiny-qwen3"].configured(), "q3_k")
    assert not list(tmp_path.iterdir())
