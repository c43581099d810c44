"""Generation on a GPU, decode steps in CUDA graphs: tokens of the unmodified model."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_trees

import specmoe_compile
from specmoe_compile.errors import SpecMoEError
from tests.e2e.prompt_lengths import check_lengths, load_plain, offload
from tests.helpers import PATIENCE_S, greedy, prompts

pytestmark = pytest.mark.gpu

STATIC = {"cache_implementation": "static"}


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Any:
    return load_plain(checkpoint, "cuda")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the functions of which a CUDA graph was recorded."""
    found: list[int] = []
    record = cudagraph_trees.CUDAGraphTreeManager.record_function

    def recording(manager: Any, inputs: Any, function_id: Any) -> Any:
        found.append(function_id.id)
        return record(manager, inputs, function_id)

    monkeypatch.setattr(cudagraph_trees.CUDAGraphTreeManager, "record_function", recording)
    return found


@pytest.fixture
def pair(checkpoint: Path) -> Iterator[tuple[Any, Any]]:
    model, compiled = offload(checkpoint, "cuda")
    yield model, compiled
    specmoe_compile.close(model)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_prompts_of_all_lengths(
    cache: str, batch: int, pair: tuple[Any, Any], plain: Any, recorded: list[int]
) -> None:
    check_lengths(pair[1], plain, cache=cache, batch=batch)
    assert bool(recorded) == (cache == "static"), "decode with a static cache alone is captured"


def test_prompts_are_not_traced(pair: tuple[Any, Any], plain: Any) -> None:
    """Of prompts of other lengths, in caches of one length, the decode step's graph is left."""
    torch._dynamo.reset()
    counters.clear()
    for length, tokens in ((40, 34), (70, 4)):
        ids = prompts(1, length).cuda()
        expected = greedy(plain, ids, tokens, **STATIC)
        assert torch.equal(greedy(pair[1], ids, tokens, **STATIC), expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_threads_forks_and_wrappers(pair: tuple[Any, Any], plain: Any, recorded: list[int]) -> None:
    """Two threads on one model whose graphs another thread recorded; then a forked process."""
    _, compiled = pair
    one, other = prompts(1, 9).cuda(), prompts(1, 9, seed=1).cuda()
    expected = {id(ids): greedy(plain, ids, 24, **STATIC) for ids in (one, other)}
    assert torch.equal(greedy(compiled, one, 24, **STATIC), expected[id(one)])
    wrong: list[str] = []

    def work(ids: torch.Tensor) -> None:
        try:
            for _ in range(3):
                if not torch.equal(greedy(compiled, ids, 24, **STATIC), expected[id(ids)]):
                    wrong.append("other tokens")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(ids,), daemon=True) for ids in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "it hangs"
    assert wrong == [] and recorded
    child = os.fork()
    if child == 0:
        try:
            compiled(one)
        except SpecMoEError as error:
            os._exit(0 if "forked" in str(error) else 4)
        except BaseException:
            os._exit(5)
        os._exit(6)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_reset_of_dynamo_between_generations(pair: tuple[Any, Any], plain: Any) -> None:
    """The model's graphs outlive a reset, which turns off what they need of PyTorch."""
    ids = prompts(1, 9).cuda()
    expected = greedy(plain, ids, 8, **STATIC)
    for _ in range(2):
        assert torch.equal(greedy(pair[1], ids, 8, **STATIC), expected)
        torch._dynamo.reset()


def test_kept_outputs_do_not_change(pair: tuple[Any, Any], plain: Any) -> None:
    """Scores that `generate` returns are those of their step, also after later steps."""
    ids = prompts(1, 9).cuda()
    settings = {**STATIC, "return_dict_in_generate": True, "output_logits": True}
    found, expected = (greedy(m, ids, 6, **settings) for m in (pair[1], plain))
    for step, (mine, theirs) in enumerate(zip(found.logits, expected.logits, strict=True)):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3, msg=f"step {step}")


@contextlib.contextmanager
def no_more_memory() -> Iterator[None]:
    """PyTorch may take nothing from the driver beyond what it holds now."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def assert_names_what_did_not_fit(error: BaseException) -> None:
    text = str(error)
    assert "do not fit the GPU's memory" in text and "are free, the expert cache takes" in text
    assert "smaller expert_cache" in text and "max_new_tokens" in text and "\n" not in text


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("what", ["keys and values", "prompt"])
def test_a_generation_that_does_not_fit_is_one_sentence(
    what: str, is_compiled: bool, pair: tuple[Any, Any], plain: Any
) -> None:
    """Keys and values of 4 GiB, or the activations of 65536 tokens; the model goes on."""
    model, ids = pair[is_compiled], prompts(1, 9).cuda()
    expected = greedy(plain, ids, 6, **STATIC)
    assert torch.equal(greedy(model, ids, 6, **STATIC), expected)
    long = prompts(4, 16384).cuda() if what == "prompt" else ids
    new_tokens = 2 if what == "prompt" else (4 << 30) // (2 * 2 * 2 * 16 * 4)
    with no_more_memory(), pytest.raises(SpecMoEError) as caught:
        greedy(model, long, new_tokens, **(STATIC if what == "keys and values" else {}))
    assert_names_what_did_not_fit(caught.value)
    del caught  # its traceback keeps the tensors of the call
    model._previous_max_cache_length = -1  # or transformers asks for as much again
    assert torch.equal(greedy(model, ids, 6, **STATIC), expected)


@pytest.mark.parametrize("when", ["warming up", "recording"])
def test_a_cuda_graph_that_does_not_fit_is_one_sentence(
    when: str, pair: tuple[Any, Any], plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory ends as the decode step first runs in its pool, or in the middle of its recording."""
    ids = prompts(1, 9).cuda()
    run_eager = cudagraph_trees.CUDAGraphTreeManager.run_eager
    record = cudagraph_trees.CUDAGraphNode._record
    tried: list[str] = []

    def warm_up_without_memory(manager: Any, inputs: Any, function_id: Any) -> Any:
        tried.append("warming up")
        with no_more_memory():
            return run_eager(manager, inputs, function_id)

    def record_too_much(node: Any, step: Any, inputs: Any) -> Any:
        def larger(inputs: Any) -> Any:
            tried.append("recording")
            results = step(inputs)
            torch.empty(1 << 41, dtype=torch.uint8, device="cuda")
            return results

        return record(node, larger, inputs)

    if when == "warming up":
        owner: Any = cudagraph_trees.CUDAGraphTreeManager
        monkeypatch.setattr(owner, "run_eager", warm_up_without_memory)
    else:
        monkeypatch.setattr(cudagraph_trees.CUDAGraphNode, "_record", record_too_much)
    with pytest.raises(SpecMoEError) as caught:
        greedy(pair[1], ids, 8, **STATIC)
    assert tried == [when]
    assert_names_what_did_not_fit(caught.value)
    monkeypatch.undo()
    assert torch.equal(greedy(pair[1], ids, 8, **STATIC), greedy(plain, ids, 8, **STATIC))
