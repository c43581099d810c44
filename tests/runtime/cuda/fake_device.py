"""A model on device cuda that has no memory: fake tensors, and a real session that runs on them.

The model is compiled as anyone's is. Its rewritten graph then runs op by op: what the graph calls
of the session runs in the session, down to the ops of its kernels, and every value must be what the
graph was told of it (shape, dtype, device, strides). A host that reads a value fails; none exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree
from transformers import AutoModelForCausalLM, PretrainedConfig, StaticCache

from benchmarks.full_size.model import coded
from specmoe_compile import backend
from specmoe_compile.hf.attach import attach_session
from specmoe_compile.hf.compiled_calls import cache_argument
from specmoe_compile.ops import _IMPLEMENTATIONS
from specmoe_compile.passes.choose_capture import why_not_captured_or_none
from specmoe_compile.passes.manager import SpeculationPass
from specmoe_compile.runtime.cuda import parts
from specmoe_compile.runtime.cuda.opening import open_session as open_cuda_session
from specmoe_compile.runtime.experts.formats.expert_format import PLAIN_FORMAT, ExpertFormat
from specmoe_compile.runtime.experts.module import (
    ExpertsLayer,
    find_experts_layers,
    find_top_k,
    release_experts,
)
from specmoe_compile.runtime.session import Session
from specmoe_compile.runtime.store.ram import RamStore

CUDA = torch.device("cuda", 0)


class UnorderedStreams:
    """Streams that order nothing: what has no contents cannot be read too early."""

    capturing = False

    def record(self, stream: str) -> None:
        return None

    def wait(self, stream: str, event: None) -> None:
        pass

    def on(self, stream: str) -> AbstractContextManager[None]:
        return nullcontext()


class EmptyStore(RamStore):
    """Records of the right sizes in host memory that is fake too."""

    def __init__(self, layers: Sequence[ExpertsLayer], top_k: int) -> None:
        stored = tuple(layer.store_layer for layer in layers)
        super(RamStore, self).__init__(stored, fingerprint="0" * 64, top_k=top_k)

    def layer_records(self, layer: int) -> Tensor:
        shape = (self.num_experts[layer], self.layouts[layer].record_bytes)
        return torch.empty(shape, dtype=torch.uint8)

    def close(self) -> None:
        pass


class OnSession(Interpreter):
    """Runs a rewritten graph; ops of `specmoe` run in the session, not as their fakes.

    Attributes:
        ran: how often each op of `specmoe` ran.
    """

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.ran: Counter[str] = Counter()

    def run_node(self, n: Node) -> Any:
        target: Any = n.target
        if n.op == "call_function" and getattr(target, "namespace", "") == "specmoe":
            name = target._schema.name.partition("::")[2]
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            out = _IMPLEMENTATIONS[name][0](*args, **kwargs)
            self.ran[name] += 1
        else:
            out = super().run_node(n)
        if "val" in n.meta:
            promised = n.meta["val"]
            assert describe(out) == describe(promised), f"{n.name} is not what the graph promises"
        return out


def describe(value: Any) -> list[Any]:
    """Shape, dtype, device and strides of each tensor of a value; all must be fake."""
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    assert all(isinstance(tensor, FakeTensor) for tensor in tensors)
    return [(tensor.shape, tensor.dtype, tensor.device, tensor.stride()) for tensor in tensors]


class FakeRun:
    """A compiled model, its session, and the graphs that were compiled.

    Attributes:
        model: as Hugging Face made it, its experts in the session's store.
        session: real, on fake tensors.
        graphs: rewritten, in the order of compiling.
        decodes: of each graph, whether CUDA graphs would capture it.
        ran: ops of `specmoe` that ran in the latest step.
    """

    def __init__(self, model: Any, session: Session, streams: UnorderedStreams) -> None:
        self.session = session
        self.graphs: list[GraphModule] = []
        self.decodes: list[bool] = []
        self.ran: Counter[str] = Counter()
        self.model = model
        self._streams = streams
        self._captures = False
        self._compiled: Any = None

    def compile(self, **options: Any) -> None:
        """Compile for CUDA graphs."""
        options = {"mode": "reduce-overhead", "lowering": "eager", **options}
        self._compiled = torch.compile(self.model, backend="specmoe", options=options)

    def cache(self, length: int, *, batch: int | None = None) -> StaticCache:
        """Keys and values of so many tokens; set up by the first step if no batch is given."""
        config = self.model.config
        cache = StaticCache(config=config, max_cache_len=length)
        if batch is not None:
            sizes = (batch, config.num_key_value_heads, config.head_dim)
            cache.early_initialization(*sizes, dtype=config.dtype, device=CUDA)
        return cache

    def step(self, batch: int, tokens: int, cache: StaticCache) -> Tensor:
        """Logits of a step, [batch, tokens, vocabulary]."""
        ids = torch.zeros(batch, tokens, dtype=torch.int64, device=CUDA)
        logits: Tensor = self._compiled(ids, **cache_argument(self._compiled, cache)).logits
        return logits

    def lower(
        self, gm: GraphModule, inputs: Sequence[Any], speculation: SpeculationPass
    ) -> backend.Compiled:
        """`backend._lower_eager`, with the session in the place of the ops' fakes."""
        decodes = why_not_captured_or_none(gm) is None

        def compile_forward(module: GraphModule, inputs: Sequence[Any]) -> Any:
            speculation(module.graph)
            module.recompile()
            self.graphs.append(module)
            self.decodes.append(decodes)

            def run(*arguments: Any) -> Any:
                self._streams.capturing = decodes
                interpreter = OnSession(module)
                self.ran = interpreter.ran
                return interpreter.run(*arguments)

            return make_boxed_func(run)

        return aot_autograd(fw_compiler=compile_forward)(gm, list(inputs))  # type: ignore[no-any-return]


@contextmanager
def fake_run(
    config: PretrainedConfig,
    monkeypatch: pytest.MonkeyPatch,
    *,
    format: ExpertFormat = PLAIN_FORMAT,
    cached_in: int = 4,
) -> Iterator[FakeRun]:
    """A model of this configuration without weights; of its experts one in `cached_in` fits."""
    recognise_form = parts.recognise_form

    def recognise_with_numbers(module: nn.Module) -> Any:
        with unset_fake_temporarily():  # it looks at what an activation returns
            return recognise_form(module)

    monkeypatch.setattr(parts, "recognise_form", recognise_with_numbers)
    # Whose graphs follow which stream is no matter of shapes, and without a GPU there is none.
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()
    layers = find_experts_layers(model)
    top_k = find_top_k(model, layers)
    with FakeTensorMode(), torch.no_grad():
        for layer in layers:
            release_experts(layer, torch.device("meta"))
        layers = [coded(layer, format) for layer in layers]
        _move_to_cuda(model)
        store, streams = EmptyStore(layers, top_k), UnorderedStreams()
        session = open_cuda_session(
            layers,
            store,
            device=CUDA,
            expert_cache_bytes=store.total_bytes // cached_in,
            top_k=top_k,
            streams=streams,  # type: ignore[arg-type]
        )
        attach_session(model, session)
        run = FakeRun(model, session, streams)
        monkeypatch.setattr(backend, "_lower_eager", run.lower)
        try:
            yield run
        finally:
            session._finalizer()  # closing would read the counters, which have no values


def _move_to_cuda(model: nn.Module) -> None:
    """Replace meta tensors by fake ones."""
    for module in model.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
            setattr(module, name, nn.Parameter(fake, requires_grad=False))
        for name, tensor in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA))
