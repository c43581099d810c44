"""Calibration: the vectors, what predictions are worth, and files that must be refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

import specmoe_compile
from specmoe_compile.calibrate.calibration import (
    MIN_RECALL,
    Calibration,
    LayerWorth,
    calibrate,
    fingerprint,
)
from specmoe_compile.errors import CalibrationError
from specmoe_compile.hf.attach import session_of
from tests.helpers import prompts, tiny_qwen3_moe

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def _offloaded(**kwargs: Any) -> Any:
    return specmoe_compile.offload(tiny_qwen3_moe(**kwargs), store="ram")


def _with_cache(folder: Path, **kwargs: Any) -> Any:
    """An offloaded model that fetches experts, so that there is something to predict."""
    return specmoe_compile.offload(
        tiny_qwen3_moe(**kwargs), store="disk", store_dir=folder / "store", expert_cache="50%"
    )


class _Trace:
    """A plain model's residuals, expert inputs and routing, of one forward pass."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.residual: list[Tensor] = []
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        hooks = []
        for layer in model.model.layers:
            norm, experts = layer.post_attention_layernorm, layer.mlp.experts
            hooks.append(
                norm.register_forward_pre_hook(lambda _, args: self.residual.append(args[0]))
            )
            hooks.append(experts.register_forward_pre_hook(lambda _, args: self.calls.append(args)))
        with torch.no_grad():
            model(tokens, use_cache=False)
        for hook in hooks:
            hook.remove()


def _default_vectors(model: Any, trace: _Trace) -> list[Tensor]:
    """Mean output of each expert over the tokens routed to it, expert by expert."""
    tables = []
    for layer, (x, ids, _) in zip(model.model.layers, trace.calls, strict=True):
        table = torch.zeros(EXPERTS, x.shape[-1])
        for expert in range(EXPERTS):
            rows = x[(ids == expert).any(dim=1)]
            gate, up = functional.linear(rows, layer.mlp.experts.gate_up_proj[expert]).chunk(2, -1)
            out = functional.linear(functional.silu(gate) * up, layer.mlp.experts.down_proj[expert])
            if len(rows):
                table[expert] = out.mean(dim=0)
        tables.append(table)
    return tables


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(
        _offloaded(), prompts(4, 40), name="tiny", held_out=prompts(2, 40, seed=1), batch=2
    )


def test_vectors_are_the_mean_outputs_of_the_experts(calibration: Calibration) -> None:
    model = tiny_qwen3_moe()
    want = _default_vectors(model, _Trace(model, prompts(4, 40)))
    assert calibration.tokens == 160 and calibration.measured_tokens == 80
    for layer in range(LAYERS):
        assert int(calibration.samples[layer].sum()) == 160 * TOP_K
        # float32 sums of up to 160 rows in another order.
        torch.testing.assert_close(
            calibration.default_vectors[layer], want[layer], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("with_vectors", [True, False])
def test_recall_and_cosine_are_those_of_the_formula(
    calibration: Calibration, with_vectors: bool
) -> None:
    model = tiny_qwen3_moe()
    trace = _Trace(model, prompts(2, 40, seed=1))
    for target in range(1, LAYERS):
        _, ids, weights = trace.calls[target - 1]
        table = calibration.default_vectors[target - 1] * float(with_vectors)
        blend = (table[ids] * weights[..., None]).sum(dim=1)
        quasi = trace.residual[target - 1].reshape(blend.shape) + blend
        layer = model.model.layers[target]
        with torch.no_grad():
            predicted = layer.mlp.gate(layer.post_attention_layernorm(quasi))[2]
        true = trace.calls[target][1]
        found = (true[:, :, None] == predicted[:, None, :]).any(-1).float().mean().item()
        cosine = functional.cosine_similarity(
            quasi, trace.residual[target].reshape(quasi.shape), dim=-1
        )
        worth = calibration.layers[target]
        recall = worth.recall if with_vectors else worth.residual_recall
        got = worth.cosine if with_vectors else worth.residual_cosine
        assert recall == pytest.approx(found, abs=1e-6)
        assert got == pytest.approx(cosine.mean().item(), abs=1e-5)


def test_first_layer_has_no_prediction(calibration: Calibration) -> None:
    first = calibration.layers[0]
    assert first.recall is None and first.cosine is None
    assert first.reason is not None and "first MoE layer" in first.reason
    assert all(layer.reason is None for layer in calibration.layers[1:])


def test_calibrating_counts_every_window_once() -> None:
    done: list[int] = []
    calibrate(
        _offloaded(layers=2),
        prompts(3, 20),
        name="tiny",
        held_out=prompts(1, 20),
        batch=2,
        on_progress=done.append,
    )
    assert sum(done) == 3 + 2 * 1


def test_no_text_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no text"):
        calibrate(_offloaded(), prompts(0, 8), name="tiny", held_out=prompts(1, 8))


def test_file_comes_back_as_it_was(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    calibration.save(path)
    again = Calibration.load(path)
    assert again.layers == calibration.layers
    assert again.fingerprint == calibration.fingerprint
    assert (again.tokens, again.measured_tokens, again.model) == (160, 80, "tiny")
    for got, want in zip(again.default_vectors, calibration.default_vectors, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(again.samples, calibration.samples, strict=True):
        assert torch.equal(got, want)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.safetensors"]


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"there is no calibration file .*none"):
        Calibration.load(tmp_path / "none")


def test_other_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CalibrationError, match="not a calibration"):
        Calibration.load(path)


def test_text_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(CalibrationError, match="not a readable calibration"):
        Calibration.load(path)


def _rewritten(calibration: Calibration, path: Path, **metadata: str) -> Path:
    """A file of the calibration with other metadata."""
    calibration.save(path)
    tensors = load_file(path)
    kept = {
        "format": "specmoe-calibration",
        "version": "1",
        "fingerprint": calibration.fingerprint,
        "model": "tiny",
        "tokens": "1",
        "measured_tokens": "1",
        "layers": json.dumps([{}]),
    }
    save_file(tensors, path, metadata=kept | metadata)
    return path


def test_other_version_is_refused(calibration: Calibration, tmp_path: Path) -> None:
    path = _rewritten(calibration, tmp_path / "c", version="99")
    with pytest.raises(CalibrationError, match="version 99, this specmoe reads version 1"):
        Calibration.load(path)


def test_damaged_metadata_is_refused(calibration: Calibration, tmp_path: Path) -> None:
    path = _rewritten(calibration, tmp_path / "c", layers="[{")
    with pytest.raises(CalibrationError, match="not a readable calibration"):
        Calibration.load(path)


def test_truncated_file_is_refused(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "c"
    calibration.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CalibrationError, match="not a readable calibration"):
        Calibration.load(path)


def test_calibration_of_another_shape_is_refused(calibration: Calibration) -> None:
    other = session_of(model := _offloaded(layers=2))
    with pytest.raises(CalibrationError, match="calibrate this model"):
        calibration.check(other)
    assert model is not None


def test_calibration_of_other_weights_is_stale(calibration: Calibration) -> None:
    model = tiny_qwen3_moe()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(1.5)
    model = specmoe_compile.offload(model, store="ram")
    with pytest.raises(CalibrationError, match="is stale"):
        calibration.check(session_of(model))


def test_fingerprint_is_the_same_in_bfloat16(calibration: Calibration) -> None:
    model = specmoe_compile.offload(tiny_qwen3_moe().to(torch.bfloat16), store="ram")
    assert fingerprint(session_of(model)) == calibration.fingerprint
    calibration.check(session_of(model))


def test_poor_layers_are_those_below_the_policys_recall(calibration: Calibration) -> None:
    def worth(recall: float | None) -> LayerWorth:
        return LayerWorth(recall=recall, cosine=0.9, residual_recall=0.1, residual_cosine=0.1)

    low, high = MIN_RECALL["exact"] - 0.01, MIN_RECALL["commit"] - 0.01
    layers = (worth(None), worth(low), worth(high), worth(1.0))
    mixed = replace(calibration, layers=layers)
    assert mixed.poor_layers("exact") == (1,)
    assert mixed.poor_layers("commit") == (1, 2)


def test_session_takes_the_vectors_and_stops_learning(
    calibration: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    calibration.save(path)
    model = _offloaded()
    session = session_of(model)
    session.default_vectors.load(Calibration.load(path).default_vectors)
    model(prompts(1, 40))
    for got, want in zip(session.default_vectors.tables, calibration.default_vectors, strict=True):
        assert torch.equal(got, want)


def test_option_default_vectors_and_automatic_skip(
    calibration: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    poor = replace(calibration.layers[1], recall=0.0)
    good = replace(calibration.layers[2], recall=1.0)
    replace(calibration, layers=(calibration.layers[0], poor, good)).save(path)
    model = _with_cache(tmp_path)
    options = {
        "default_vectors": str(path),
        "skip_layers": "auto",
        "lowering": "eager",
        "auto_off": False,
    }
    run = torch.compile(model, backend="specmoe", options=options)
    with torch.no_grad():
        run(prompts(1, 4), use_cache=False)
    session = session_of(model)
    assert torch.equal(session.default_vectors.tables[0], calibration.default_vectors[0])
    needed = [layer.needed for layer in specmoe_compile.stats(model).layers]
    assert needed[0] == needed[1] == 0 and needed[2] == 4 * TOP_K


def test_option_default_vectors_refuses_a_stale_file(
    calibration: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "c"
    replace(calibration, fingerprint="0" * 64).save(path)
    model = _with_cache(tmp_path)
    options = {"default_vectors": str(path), "lowering": "eager"}
    run = torch.compile(model, backend="specmoe", options=options)
    with torch.no_grad(), pytest.raises(Exception, match="is stale"):
        run(prompts(1, 4), use_cache=False)


def test_one_file_is_refused_for_two_models_in_one_graph(
    calibration: Calibration, tmp_path: Path
) -> None:
    calibration.save(tmp_path / "c")
    one, other = _with_cache(tmp_path / "one"), _with_cache(tmp_path / "other", layers=2)
    options = {"default_vectors": str(tmp_path / "c"), "lowering": "eager"}

    def both(ids: torch.Tensor) -> Any:
        return one(ids, use_cache=False).logits, other(ids, use_cache=False).logits

    run = torch.compile(both, backend="specmoe", options=options, fullgraph=True)
    with torch.no_grad(), pytest.raises(Exception, match=r"2 models.* not of 1 of them"):
        run(prompts(1, 4))


def test_experts_with_a_kernel_of_their_own_are_calibrated() -> None:
    # Long enough for `cpu_kernels`, whose kernel is compiled at the first single-token expert.
    model = specmoe_compile.offload(
        tiny_qwen3_moe(layers=2, moe_intermediate_size=512, top_k=1), store="ram"
    )
    found = calibrate(model, prompts(1, 5), name="tiny", held_out=prompts(1, 5, seed=1))
    assert sum(int(count.sum()) for count in found.samples) == 2 * 5
