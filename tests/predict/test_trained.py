"""Trained predictors: what training learns, the artefact, and the options that use it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import specmoe_compile
from specmoe_compile.calibrate.calibration import Calibration, LayerWorth, calibrate, use_networks
from specmoe_compile.cli.main import run
from specmoe_compile.errors import CalibrationError
from specmoe_compile.hf.attach import session_of
from specmoe_compile.options import CompileOptions, SessionOptions
from specmoe_compile.predict.network import ExpertNetwork, normalised
from specmoe_compile.predict.registry import PREDICTORS, TRAINED
from specmoe_compile.predict.training import (
    Recording,
    TrainingConfig,
    recall_of,
    train_network,
)
from tests.helpers import greedy, prompts, tiny_qwen3_moe
from tests.runtime.cuda.device_models import on_device
from tests.runtime.cuda.order_checker import unordered_pairs
from tests.runtime.cuda.stream_model import StreamModel

LAYERS, EXPERTS, TOP_K, HIDDEN = 3, 8, 2, 64
PREFETCHED_BELOW = ("previous_token", "estimator")
TRAINING = TrainingConfig(epochs=60, batch=64, learning_rate=1e-2)


def _offloaded(folder: Path) -> Any:
    return specmoe_compile.offload(
        tiny_qwen3_moe(), store="disk", store_dir=folder / "store", expert_cache="50%"
    )


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    model = specmoe_compile.offload(tiny_qwen3_moe(), store="ram")
    return calibrate(
        model,
        prompts(12, 40),
        name="tiny",
        held_out=prompts(4, 40, seed=1),
        batch=4,
        training=TRAINING,
    )


@pytest.fixture(scope="module")
def artefact(calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "c.safetensors"
    calibration.save(path)
    return path


@pytest.mark.parametrize("is_linear", [True, False])
def test_training_learns_a_linear_router(is_linear: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    gate = torch.randn(EXPERTS, 16, generator=generator)
    states = normalised(torch.randn(4000, 16, generator=generator))
    weights, ids = torch.softmax(states @ gate.t(), -1).topk(TOP_K)
    network = train_network(
        states[:3000],
        ids[:3000],
        weights[:3000],
        experts=EXPERTS,
        is_linear=is_linear,
        config=TrainingConfig(epochs=30, batch=256, learning_rate=1e-2),
    )
    recall, whole = recall_of(network, states[3000:], ids[3000:])
    assert recall > 0.9 and whole > 0.8  # chance: 0.25 and 0.04
    assert network.weight_sum == pytest.approx(float(weights[:3000].sum(1).mean()))
    assert not any(tensor.requires_grad for tensor in network.tensors.values())


def test_same_seed_gives_the_same_network() -> None:
    states = normalised(torch.randn(200, 16, generator=torch.Generator().manual_seed(0)))
    ids, weights = torch.arange(400).view(200, 2) % EXPERTS, torch.full((200, 2), 0.5)

    def train(seed: int) -> ExpertNetwork:
        config = TrainingConfig(epochs=2, batch=32, seed=seed)
        return train_network(states, ids, weights, experts=EXPERTS, is_linear=False, config=config)

    first, second, other = train(1), train(1), train(2)
    assert all(torch.equal(first.tensors[k], second.tensors[k]) for k in first.tensors)
    assert not torch.equal(first.inner, other.inner)


def test_network_predicts_its_best_scores_with_weights_that_sum_as_the_routers_do() -> None:
    generator = torch.Generator().manual_seed(0)
    network = ExpertNetwork.random(16, EXPERTS, 8, is_linear=False, generator=generator)
    network.weight_sum = 2.5
    state = torch.randn(3, 16, generator=generator)
    z = state / state.square().mean(-1, keepdim=True).sqrt()
    hidden = z @ network.inner.t() + network.inner_bias
    assert network.direct is not None
    scores = torch.nn.functional.silu(hidden) @ network.outer.t() + z @ network.direct.t()
    ids, weights = network.predict(state, 4)
    assert torch.equal(ids, scores.topk(4).indices)
    torch.testing.assert_close(weights.sum(1), torch.full((3,), 2.5))
    assert torch.equal(weights, weights.sort(dim=1, descending=True).values)
    wide, none = network.predict(state, EXPERTS + 2)
    assert torch.equal(wide[:, :4], ids) and wide.shape == none.shape == (3, EXPERTS + 2)
    assert (wide[:, EXPERTS:] == -1).all() and (none[:, EXPERTS:] == 0).all()


def test_recording_keeps_the_same_tokens_of_states_and_choices() -> None:
    recording = Recording(share=0.5, seed=4)
    for batch in range(3):
        recording.begin(100)
        number = torch.arange(100.0) + 100 * batch
        recording.add_state("estimator", 1, torch.stack((number, torch.ones(100)), 1)[None])
        recording.add_choice(1, number[:, None].long(), number[:, None])
    states, (ids, weights) = recording.states("estimator", 1), recording.choices(1)
    assert 100 < len(ids) < 200
    want = normalised(torch.stack((ids[:, 0].float(), torch.ones(len(ids))), 1)).half()
    assert torch.equal(states, want) and torch.equal(weights[:, 0], ids[:, 0].float())


def test_calibration_trains_each_layer_that_can_be_predicted(calibration: Calibration) -> None:
    assert list(calibration.trained) == list(TRAINED)
    estimator, attention = (calibration.trained[n] for n in ("estimator", "pre_attention"))
    assert [n is None for n in estimator.networks] == [True, False, False]
    assert [n is None for n in attention.networks] == [False, False, False]
    for trained in (estimator, attention):
        assert trained.tokens == 480 and trained.epochs == 60 and trained.seconds > 0
        for recall, network in zip(trained.recall, trained.networks, strict=True):
            assert (recall is None) == (network is None)
            assert recall is None or recall > 1.3 * TOP_K / EXPERTS  # chance is K / E
    assert estimator.parameters == sum(
        tensor.numel() for n in estimator.networks if n is not None for tensor in n.tensors.values()
    )


def test_artefact_comes_back_as_it_was(calibration: Calibration, artefact: Path) -> None:
    again = Calibration.load(artefact)
    for name, want in calibration.trained.items():
        got = again.trained[name]
        assert got.about() == want.about()
        for one, other in zip(got.networks, want.networks, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert (
                    one.weight_sum == other.weight_sum
                    and one.tensors.keys() == other.tensors.keys()
                )
                assert all(torch.equal(one.tensors[k], other.tensors[k]) for k in one.tensors)
    names = {key.split(".")[0] for key in load_file(artefact)}
    assert names == {"default_vectors", "samples", *TRAINED}


def test_file_without_networks_is_refused_by_name(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "c"
    replace(calibration, trained={}).save(path)
    assert Calibration.load(path).trained == {}
    session = session_of(model := specmoe_compile.offload(tiny_qwen3_moe(), store="ram"))
    for name in (*TRAINED, "hybrid"):
        with pytest.raises(CalibrationError, match="--train-estimator"):
            use_networks(session, Calibration.load(path), name)
    assert model is not None


def test_auto_is_hybrid_where_networks_were_trained(calibration: Calibration) -> None:
    bare = replace(calibration, trained={})
    assert calibration.resolved("auto", lookahead=1) == "hybrid"
    assert calibration.resolved("auto", lookahead=2) == "default_vectors"
    assert bare.resolved("auto", lookahead=1) == "default_vectors"
    assert calibration.resolved("residual", lookahead=1) == "residual"


def test_hybrid_takes_the_estimator_where_it_was_better(calibration: Calibration) -> None:
    def worth(recall: float | None) -> LayerWorth:
        return LayerWorth(recall=recall, cosine=0.9, residual_recall=0.1, residual_cosine=0.1)

    estimator = replace(calibration.trained["estimator"], recall=(None, 0.5, 0.5))
    mixed = replace(
        calibration,
        layers=(worth(None), worth(0.4), worth(0.6)),
        trained={**calibration.trained, "estimator": estimator},
    )
    assert mixed.network_layers("hybrid") == (1,)
    assert mixed.network_layers("estimator") == mixed.network_layers("default_vectors") == ()
    assert mixed.recall_of("hybrid") == (None, 0.5, 0.6)
    assert mixed.recall_of("residual") == (0.1, 0.1, 0.1)
    assert mixed.poor_layers("commit", "estimator") == (1, 2)


def test_unknown_predictor_is_an_error_that_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="predictor='oracle'") as error:
        CompileOptions.from_kwargs({"predictor": "oracle"})
    assert all(name in str(error.value) for name in ("auto", *PREDICTORS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor": "estimator"}, "needs default_vectors=FILE"),
        ({"predictor": "hybrid"}, "needs default_vectors=FILE"),
        (
            {"predictor": "pre_attention", "default_vectors": "c", "lookahead": 2},
            "needs lookahead=1",
        ),
        ({"predictor": "previous_token", "policy": "commit"}, "predicts no router weights"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompileOptions.from_kwargs(options)


# With networks "auto" is "hybrid". The tests below say of two predictors what they prefetch, too.
@pytest.mark.parametrize(
    "name",
    [
        "auto",
        *(
            pytest.param(name, marks=pytest.mark.slow if name in PREFETCHED_BELOW else ())
            for name in PREDICTORS
            if name != "hybrid"
        ),
    ],
)
def test_exact_is_exact_and_recall_is_counted(artefact: Path, tmp_path: Path, name: str) -> None:
    model = _offloaded(tmp_path)
    options = {
        "predictor": name,
        "default_vectors": str(artefact),
        "auto_off": False,
        "lowering": "eager",
    }
    compiled: Any = torch.compile(model, backend="specmoe", options=options)
    tokens = greedy(compiled, prompts(1, 20), 12, cache_implementation="static")
    assert torch.equal(tokens, greedy(tiny_qwen3_moe(), prompts(1, 20), 12))
    assert_counted(model, steps=11, from_layer=0 if name == "pre_attention" else 1)


def assert_counted(model: Any, *, steps: int, from_layer: int = 1) -> None:
    """K experts were needed and predicted in each step of each layer but the first ones."""
    stats = specmoe_compile.stats(model)
    for index, layer in enumerate(stats.layers):
        assert layer.needed == layer.predicted == (steps if index >= from_layer else 0) * TOP_K
    assert 0 < stats.total.recall < 1


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_code_predicts_as_the_probe_measured(
    calibration: Calibration, artefact: Path, tmp_path: Path, lowering: str
) -> None:
    """One token at a time: the network's own choice is what is prefetched."""
    model = _offloaded(tmp_path)
    session = session_of(model)
    started: dict[int, list[Any]] = {layer: [] for layer in range(LAYERS)}
    seen: dict[int, list[Any]] = {layer: [] for layer in range(LAYERS)}
    start, predict = session.engine.start, session.predictions.predict

    def watch_start(layer: int, ids: Any, weights: Any) -> int:
        started[layer].append(ids.tolist())
        return start(layer, ids, weights)

    def watch_predict(layer: int, state: Any, width: int) -> Any:
        seen[layer].append(
            calibration.trained["estimator"].networks[layer].predict(state, width)[0].tolist()
        )  # type: ignore[union-attr]
        return predict(layer, state, width)

    session.engine.start = watch_start  # type: ignore[method-assign]
    session.predictions.predict = watch_predict  # type: ignore[method-assign]
    options = {
        "predictor": "estimator",
        "default_vectors": str(artefact),
        "auto_off": False,
        "lowering": lowering,
    }
    compiled: Any = torch.compile(model, backend="specmoe", options=options)
    tokens = greedy(compiled, prompts(1, 20), 6, cache_implementation="static")
    assert torch.equal(tokens, greedy(tiny_qwen3_moe(), prompts(1, 20), 6))
    assert started[0] == [] and len(started[1]) == 5
    assert started[1] == seen[1] and started[2] == seen[2]
    assert_counted(model, steps=5)


@pytest.mark.usefixtures("prompts_left_to_the_model")
def test_previous_token_prefetches_what_the_layer_chose_before(tmp_path: Path) -> None:
    model = _offloaded(tmp_path)
    session = session_of(model)
    chosen: list[Any] = []
    started: list[Any] = []
    settle, start = session.engine.settle, session.engine.start

    def watch_settle(number: int, layer: int, ids: Any) -> int:
        if layer == 1:
            chosen.append(ids.tolist())
        return settle(number, layer, ids)

    def watch_start(layer: int, ids: Any, weights: Any) -> int:
        if layer == 1:
            started.append(ids.tolist())
        return start(layer, ids, weights)

    session.engine.settle = watch_settle  # type: ignore[method-assign]
    session.engine.start = watch_start  # type: ignore[method-assign]
    options = {"predictor": "previous_token", "auto_off": False, "lowering": "eager"}
    compiled: Any = torch.compile(model, backend="specmoe", options=options)
    tokens = greedy(compiled, prompts(1, 20), 6, cache_implementation="static")
    assert torch.equal(tokens, greedy(tiny_qwen3_moe(), prompts(1, 20), 6))
    assert started[0] == [[-1, -1]], "the prompt is no single token"
    assert len(started) == 5 and started[1:] == chosen[:-1]
    assert_counted(model, steps=5)


def test_device_session_predicts_with_networks(artefact: Path) -> None:
    streams = StreamModel()
    model, session = on_device(tiny_qwen3_moe(), streams, slots=4)
    torch._dynamo.reset()
    options = {"predictor": "estimator", "default_vectors": str(artefact), "lowering": "eager"}
    with session:
        compiled: Any = torch.compile(model, backend="specmoe", options=options)
        tokens = greedy(compiled, prompts(1, 5), 8, cache_implementation="static")
        assert torch.equal(tokens, greedy(tiny_qwen3_moe(), prompts(1, 5), 8))
        assert session.stats.total.prefetches > 0
        assert not unordered_pairs(streams.ops)


def test_device_session_refuses_what_a_captured_graph_cannot_remember() -> None:
    _, session = on_device(tiny_qwen3_moe(), StreamModel(), slots=4)
    with session, pytest.raises(ValueError, match="previous_token"):
        session.configure(SessionOptions(predictor="previous_token"))


@pytest.mark.parametrize(
    "policy", ["commit", pytest.param("default_vector", marks=pytest.mark.slow)]
)
def test_approximate_policies_run_with_a_trained_predictor(
    artefact: Path, tmp_path: Path, policy: str
) -> None:
    model = _offloaded(tmp_path)
    options = {
        "predictor": "estimator",
        "default_vectors": str(artefact),
        "policy": policy,
        "lowering": "eager",
    }
    compiled: Any = torch.compile(model, backend="specmoe", options=options)
    tokens = greedy(compiled, prompts(1, 20), 8, cache_implementation="static")
    assert tokens.shape == (1, 28)


def test_command_trains_and_names_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.reference_model.tokenizer import build_tokenizer
    from tests.helpers import save_tiny

    monkeypatch.setenv("COLUMNS", "160")  # a narrow table breaks names
    folder = save_tiny(tmp_path / "model")
    build_tokenizer(256).save_pretrained(folder)
    text, out = tmp_path / "text.txt", tmp_path / "c.safetensors"
    text.write_text("THE QUICK BROWN FOX JUMPS OVER 13 LAZY DOGS. " * 20)
    command = ["calibrate", str(folder), "--text", str(text), "--out", str(out), "--store", "ram"]
    command += ["--window", "32", "--tokens", "256", "--train-estimator", "--epochs", "2"]
    assert run(command) == 0
    trained = Calibration.load(out).trained
    assert list(trained) == list(TRAINED)
    assert all(predictor.epochs == 2 for predictor in trained.values())
    assert "estimator" in capsys.readouterr().out
