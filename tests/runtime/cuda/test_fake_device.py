"""The path of CUDA graphs, traced without a GPU from the model to the ops of the kernels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers import AutoConfig, PretrainedConfig

from benchmarks.full_size.model import SHAPES
from specmoe_compile.calibrate.layer_probe import LayerMeasure, LayerProbe
from specmoe_compile.passes.check_invariants import check_invariants
from specmoe_compile.passes.fx_utils import find_calls, specmoe_ops
from specmoe_compile.reference_model import CHECKPOINT_DIR
from specmoe_compile.runtime.cuda import decoder
from specmoe_compile.runtime.experts.formats.expert_format import PLAIN_FORMAT, ExpertFormat
from specmoe_compile.system.compilers import find_compiler_or_none
from tests.runtime.cuda.cuda_guard import install_cuda_guard
from tests.runtime.cuda.fake_device import CUDA, FakeRun, fake_run


def reference_model(layers: int = 8) -> PretrainedConfig:
    """The trained model of the repository: 8 layers of 32 experts, or the first of them."""
    return AutoConfig.from_pretrained(CHECKPOINT_DIR, num_hidden_layers=layers)


def qwen3_30b(layers: int = 48) -> PretrainedConfig:
    """The shape of Qwen3-30B-A3B, as its model card gives it."""
    config: PretrainedConfig = SHAPES["Qwen3-30B-A3B"].configured(layers)
    config.dtype = torch.bfloat16
    return config


@pytest.fixture(scope="module", autouse=True)
def _guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    if torch.cuda.is_available():
        return  # PyTorch's own guard will do
    compiler = find_compiler_or_none()
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    install_cuda_guard(tmp_path_factory.mktemp("guard"), compiler)


def check_graph(run: FakeRun, layers: int, *, decodes: bool) -> None:
    """The graph that was compiled last, and what ran of it."""
    graph = run.graphs[-1].graph
    check_invariants(graph)
    assert run.decodes[-1] == decodes
    tensors = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    if decodes:
        assert {tensor.device for tensor in tensors} == {CUDA}, "CUDA graphs hold no other device"
    predicted = len(list(find_calls(graph, specmoe_ops().start_prefetch.default)))
    assert predicted == (layers - 1 if decodes else 0)
    attentions = len(list(find_calls(graph, torch.ops.specmoe_kernels.decode_attention.default)))
    assert attentions == (layers if decodes else 0)
    ranges = len(list(find_calls(graph, torch.ops.specmoe_kernels.attended_range.default)))
    assert ranges == (1 if decodes else 0), "layers with one mask share its range"
    ours, models = torch.ops.specmoe_kernels.top_k.default, torch.ops.aten.topk.default
    assert len(list(find_calls(graph, ours))) == layers + predicted
    assert not list(find_calls(graph, models))
    assert run.ran["start_prefetch"] == run.ran["blend_default_vectors"] == predicted
    assert run.ran["experts"] + run.ran["correct_experts"] == layers
    assert run.ran["wait_prefetch"] == run.ran["run_resident_experts"] == run.ran["correct_experts"]
    assert run.ran["correct_experts"] == (layers if decodes else 0)


def trace(
    config: Any,
    monkeypatch: pytest.MonkeyPatch,
    batch: int = 1,
    format: ExpertFormat = PLAIN_FORMAT,
    **options: Any,
) -> None:
    """A prompt and two steps of one token."""
    layers = config.num_hidden_layers
    with fake_run(config, monkeypatch, format=format) as run:
        run.compile(**options)
        cache = run.cache(64)
        for tokens in (40, 1, 1):
            logits = run.step(batch, tokens, cache)
            assert logits.shape == (batch, tokens, config.vocab_size)
            assert (logits.dtype, logits.device) == (config.dtype, CUDA)
            check_graph(run, layers, decodes=tokens == 1)
        assert run.decodes == [False, True], "the second step runs the graph of the first"


def test_decode_step_of_the_reference_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config = reference_model(layers=4)
    with fake_run(config, monkeypatch) as run:
        run.compile()
        run.step(1, 1, run.cache(64, batch=1))
        check_graph(run, config.num_hidden_layers, decodes=True)


def test_steps_of_two_layers_of_qwen3_30b(monkeypatch: pytest.MonkeyPatch) -> None:
    trace(qwen3_30b(layers=2), monkeypatch, batch=2, policy="default_vector")


def test_steps_of_a_model_with_coded_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["Qwen3-30B-A3B-nvfp4"]
    config = qwen3_30b(layers=2)
    trace(config, monkeypatch, format=shape.format)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "policy"), [(1, "exact"), (3, "default_vector"), (1, "commit")])
@pytest.mark.parametrize("config", [reference_model, qwen3_30b])
def test_steps_of_whole_models(
    config: Any, batch: int, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace(config(), monkeypatch, batch=batch, policy=policy)


def test_a_step_that_sets_up_a_cache_is_not_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys and values that a CUDA graph makes are overwritten by the next step."""
    config = qwen3_30b(layers=2)
    with fake_run(config, monkeypatch) as run:
        run.compile()
        cache = run.cache(64)
        run.step(1, 9, cache)
        assert run.decodes == [False], "it sets up the cache, short as it is"
        run.step(1, 1, cache)
        assert run.decodes == [False, True]
        run.step(1, 1, run.cache(64))
        assert run.decodes == [False, True, False], "a prompt of one token is no decode step"


def test_a_captured_step_with_every_expert_in_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is predicted, split or planned, and what counts the step is one launch."""
    with fake_run(qwen3_30b(layers=2), monkeypatch, cached_in=1) as run:
        run.compile()
        run.step(1, 1, run.cache(64, batch=1))
        assert run.decodes == [True] and run.ran == {"experts": 2}
        graph = run.graphs[-1].graph
        tensors = [n.meta["val"] for n in graph.nodes if isinstance(n.meta.get("val"), Tensor)]
        assert {tensor.device for tensor in tensors} == {CUDA}
        assert len(list(find_calls(graph, torch.ops.specmoe_kernels.top_k.default))) == 2


def test_small_products_of_a_captured_token_are_ours_unless_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, models = torch.ops.specmoe_kernels.products.default, torch.ops.aten.mm.default
    found = []
    for products in ("auto", False):
        with fake_run(qwen3_30b(layers=2), monkeypatch, cached_in=1) as run:
            run.compile(products=products)
            run.step(1, 1, run.cache(64, batch=1))
            graph = run.graphs[-1].graph
            sizes = [
                [weight.meta["val"].shape[0] for weight in call.args[1]]
                for call in find_calls(graph, ours)
            ]
            found.append((sizes, len(list(find_calls(graph, models)))))
    # q, k and v; o; the router. The head, of 151,936 outputs, is left.
    of_a_layer = [[4096, 512, 512], [2048], [128]]
    assert found == [(2 * of_a_layer, 1), ([], 2 * 5 + 1)]


PLANTED = {
    "strides": lambda y: y.transpose(1, 2).contiguous().transpose(1, 2),
    "device": lambda y: y.cpu(),
    "dtype": lambda y: y.float(),
    "shape": lambda y: y[:, :-1],
}


def test_kernels_that_break_the_graphs_promise_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = decoder.run_resident_experts
    with fake_run(qwen3_30b(layers=2), monkeypatch) as run:
        run.compile()
        cache = run.cache(64, batch=1)
        run.step(1, 1, cache)
        for name, spoil in PLANTED.items():
            with monkeypatch.context() as planted:
                spoiled = lambda *args, spoil=spoil: spoil(kernel(*args))  # noqa: E731
                planted.setattr(decoder, "run_resident_experts", spoiled)
                with pytest.raises(AssertionError, match=r"run_resident_experts\w* is not what"):
                    run.step(1, 1, cache)
                assert run.ran["run_resident_experts"] == 1, name
        with monkeypatch.context() as planted:
            reads = lambda *args: kernel(*args) * int(args[1].sum())  # noqa: E731
            planted.setattr(decoder, "run_resident_experts", reads)
            with pytest.raises(DataDependentOutputException):
                run.step(1, 1, cache)


def test_values_that_are_not_what_passes_wrote_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lookahead's nodes are clones, whose values the passes wrote down themselves."""
    with fake_run(qwen3_30b(layers=2), monkeypatch) as run:
        run.compile()
        cache = run.cache(64, batch=1)
        run.step(1, 1, cache)
        (blend,) = find_calls(run.graphs[-1].graph, specmoe_ops().blend_default_vectors.default)
        clone = next(user for user in blend.users)
        with clone.meta["val"].fake_mode:
            clone.meta["val"] = clone.meta["val"].cpu()
        with pytest.raises(AssertionError, match=f"{clone.name} is not what the graph promises"):
            run.step(1, 1, cache)


def test_calibration_computes_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[Tensor, ...]] = []
    # They read values for the host's sums, which fake tensors do not have.
    monkeypatch.setattr(
        LayerMeasure, "add", lambda _, predicted, true: met.append((predicted, true))
    )
    monkeypatch.setattr(LayerProbe, "compare", lambda _, *states: met.append(states[:2]))
    config = reference_model(layers=3)
    with fake_run(config, monkeypatch) as run:
        probe = LayerProbe(run.model, run.session)
        probe.run(torch.zeros(1, 40, dtype=torch.int64))
        tables = [*probe.vectors, *probe.sums, *probe.counts, *probe.means()]
        assert len(met) >= 2 * (config.num_hidden_layers - 1)
        assert {tensor.device for tensor in (*tables, *itertools.chain(*met))} == {CUDA}
