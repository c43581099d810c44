"""What CUDA graphs return and where they live, by a stand-in that runs without a GPU.

The stand-in has what matters of a graph: it returns the same memory every time, writes over it when
it runs again, and must not run in two threads at once.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor import cudagraph_trees
from transformers import StaticCache

import specmoe_compile
from specmoe_compile.errors import SpecMoEError
from specmoe_compile.hf import gpu_memory, run_ahead
from specmoe_compile.hf.attach import session_of
from specmoe_compile.hf.compiled_calls import cache_argument
from specmoe_compile.hf.graph_threads import GraphState
from specmoe_compile.system.captured import keeping_results
from tests.helpers import PATIENCE_S, greedy, prompts

STEPS = 6


@pytest.fixture
def offloaded(checkpoint: Path) -> Iterator[Any]:
    model = specmoe_compile.from_pretrained(checkpoint, device="cpu", store="ram", progress=False)
    yield model
    specmoe_compile.close(model)


class Recorded:
    """A graph that was recorded: one result, in memory of its own."""

    runs = 0

    def __init__(self, graph: Callable[..., Any]) -> None:
        self._graph, self._busy = graph, threading.Lock()
        self._memory: torch.Tensor | None = None

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        assert self._busy.acquire(blocking=False), "two threads run one graph"
        try:
            if self._memory is not None:
                self._memory.fill_(float("nan"))
            results = tuple(self._graph(*inputs))
            (made,) = [i for i, t in enumerate(results) if not any(t is given for given in inputs)]
            if self._memory is None:
                self._memory = torch.empty_like(results[made])
            self._memory.copy_(results[made])
            Recorded.runs += 1
            return (*results[:made], self._memory, *results[made + 1 :])
        finally:
            self._busy.release()


@pytest.fixture
def captured(offloaded: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model, compiled so that each decode step is a `Recorded`."""

    def lower(gm: Any, example_inputs: Any, **settings: Any) -> Any:
        is_graph = settings["config_patches"].get("triton.cudagraphs")
        return Recorded(gm.forward) if is_graph else gm.forward

    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lower)
    monkeypatch.setattr(Recorded, "runs", 0)
    return torch.compile(offloaded, backend="specmoe", mode="reduce-overhead")


def decode(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids, **cache_argument(model, cache)).logits
    return logits


def test_a_kept_result_survives_other_threads_and_later_steps(captured: Any, plain: Any) -> None:
    one, other = prompts(1, 5), prompts(1, 5, seed=1)
    kept, expected = [], []
    for ids in (one, other):
        caches = [StaticCache(plain.config, max_cache_len=16) for _ in range(2)]
        decode(captured, ids, caches[0]), decode(plain, ids, caches[1])
        for step in range(3):
            token = torch.tensor([[7 + step]])
            found: list[torch.Tensor] = []
            thread = threading.Thread(
                target=lambda t=token, c=caches[0], f=found: f.append(decode(captured, t, c))
            )
            thread.start()
            thread.join(PATIENCE_S)
            kept += found
            expected.append(decode(plain, token, caches[1]))
    assert Recorded.runs == len(kept) == 6, "every decode step is a graph"
    for mine, theirs in zip(kept, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_threads_generate_with_one_captured_model(
    captured: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With steps launched early as on a GPU, while the other thread runs the same graph."""
    monkeypatch.setattr(run_ahead, "runs_ahead_on", lambda device: True)
    given = [prompts(1, 5, seed=seed) for seed in range(3)]
    settings = {"cache_implementation": "static"}
    expected = [greedy(plain, ids, STEPS, **settings) for ids in given]
    wrong: list[str] = []

    def work(index: int) -> None:
        try:
            for _ in range(3):
                found = greedy(captured, given[index], STEPS, **settings)
                if not torch.equal(found, expected[index]):
                    wrong.append(f"other tokens: {found.tolist()}")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "it hangs"
    assert wrong == [] and Recorded.runs > 0


def test_every_thread_sees_its_models_trees_and_gets_its_own_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams: list[Any] = []

    class Stream:
        def wait_stream(self, other: Any) -> None:
            streams.append((self, other))

    now = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    first, second, device = GraphState(), GraphState(), torch.device("cuda")
    names = ("tree_manager_containers", "tree_manager_locks")
    local = cudagraph_trees.local
    seen: list[tuple[int, int]] = []

    def look() -> None:
        had = [hasattr(local, name) for name in names]
        for state in (first, second, first):
            with state.in_use(device):
                containers, _ = (getattr(local, name) for name in names)
                seen.append((id(state), id(containers)))
                with second.in_use(device):
                    pass
                assert local.tree_manager_containers is containers
        assert [hasattr(local, name) for name in names] == had

    look()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join(PATIENCE_S)
    assert len(seen) == 6, "a thread that PyTorch did not start has trees, too"
    assert len(set(seen)) == 2, "one for each model, whichever thread runs it"
    assert streams == []
    before, now = now, Stream()
    with first.in_use(device):
        assert streams == [(now, before)], "another stream waits for the last one"


def out_of_memory(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.50 GiB. GPU 0 has ...")


def broken_off(*args: Any, **kwargs: Any) -> Any:
    """What a recording may end in: an error of its own, raised while the first one is handled."""
    try:
        out_of_memory()
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("where", ["keys and values", "graph", "recording", "eager", "scores"])
def test_memory_that_does_not_fit_is_one_sentence(
    where: str, offloaded: Any, captured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted where generate allocates: the cache, the graph's memory, a layer, the scores."""
    ids, model = prompts(1, 5), captured
    if where == "keys and values":
        model = offloaded  # traced by Dynamo, the line would run with fake tensors
        lazily = "transformers.cache_utils.StaticLayer.lazy_initialization"
        monkeypatch.setattr(lazily, out_of_memory)
    elif where == "graph":
        monkeypatch.setattr(Recorded, "__call__", out_of_memory)
    elif where == "recording":
        monkeypatch.setattr(Recorded, "__call__", broken_off)
    elif where == "scores":
        monkeypatch.setattr(run_ahead._Chooser, "choose", out_of_memory)
    else:
        model = offloaded
        monkeypatch.setattr(type(offloaded.model.layers[0].mlp), "forward", out_of_memory)
    with pytest.raises(SpecMoEError) as caught:
        greedy(model, ids, 4, cache_implementation="static")
    text = str(caught.value)
    assert "12.50 GiB were asked for" in text and "the expert cache takes" in text
    assert "smaller expert_cache" in text and "max_new_tokens" in text
    monkeypatch.undo()
    assert greedy(offloaded, ids, 4).shape == (1, 9), "the model goes on"


def test_memory_of_a_gpu_is_told_in_numbers(
    offloaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 24 << 30))
    session = SimpleNamespace(device=torch.device("cuda"), stats=session_of(offloaded).stats)
    numbers = r"3\.0 GiB of the GPU's 24\.0 GiB are free"
    with (
        pytest.raises(SpecMoEError, match=numbers),
        gpu_memory.naming_what_did_not_fit(session),  # type: ignore[arg-type]
    ):
        out_of_memory()


def test_an_error_that_is_kept_keeps_no_tensors(offloaded: Any) -> None:
    """Or the next recording would find them in its graphs' memory."""
    held: list[weakref.ref[torch.Tensor]] = []

    def step() -> None:
        activations = torch.ones(3)
        held.append(weakref.ref(activations))
        broken_off()

    with (
        pytest.raises(SpecMoEError) as caught,
        gpu_memory.naming_what_did_not_fit(session_of(offloaded)),
    ):
        step()
    assert caught.value.__cause__ is not None and held[0]() is None


def test_a_warm_up_that_failed_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own classes, without a GPU: a node that ran has results, one that failed none."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    state, error = GraphState(), MemoryError("no more")
    for results in ([], ["a result"]):
        node = object.__new__(cudagraph_trees.CUDAWarmupNode)
        node.tensor_weakrefs = results  # type: ignore[assignment]
        node.wrapped_function = SimpleNamespace(id=3)  # type: ignore[assignment]
        manager = SimpleNamespace(current_node=node, warmed_up_functions={3})
        state._values[0][0] = SimpleNamespace(tree_manager=manager)
        state._values[0][1] = SimpleNamespace(tree_manager=None)
        with pytest.raises(MemoryError), state.in_use(torch.device("cuda")):
            raise error
        assert manager.current_node is (node if results else None)
        assert manager.warmed_up_functions == ({3} if results else set())


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be ... reported",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.",
    ],
)
def test_other_ways_to_say_so(said: str, offloaded: Any) -> None:
    with (
        pytest.raises(SpecMoEError, match=r"do not fit memory: .*(allocator could|1 B) "),
        gpu_memory.naming_what_did_not_fit(session_of(offloaded)),
    ):
        raise RuntimeError(said)


def test_other_errors_are_left_alone(offloaded: Any) -> None:
    for error in (RuntimeError("shapes do not match"), SpecMoEError("closed"), ValueError("x")):
        with (
            pytest.raises(type(error)) as caught,
            gpu_memory.naming_what_did_not_fit(session_of(offloaded)),
        ):
            raise error
        assert caught.value is error


def test_a_graphs_result_is_not_its_memory() -> None:
    cache, memory = torch.zeros(2), torch.ones(3)
    call = keeping_results(lambda *_: (cache, memory), frozenset({1}))
    same, mine = call()
    memory.fill_(9)
    assert same is cache and torch.equal(mine, torch.ones(3))
