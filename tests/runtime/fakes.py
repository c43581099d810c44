"""Tiny experts layers and stores that the runtime's tests share.

Shape letters: T tokens, E experts, K top-k, H hidden, I expert intermediate, L MoE layers.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from specmoe_compile.errors import StoreError
from specmoe_compile.runtime.experts.layout import ExpertLayout
from specmoe_compile.runtime.experts.module import ExpertsLayer, expert_parameter_names
from specmoe_compile.runtime.session import Session
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.store.ram import RamStore
from specmoe_compile.runtime.transfer.base import Read
from tests.helpers import PATIENCE_S

E, K, H, INTERMEDIATE, L = 8, 2, 32, 48, 3


def qwen_experts(
    *, experts: int = E, hidden: int = H, intermediate: int = INTERMEDIATE, seed: int = 0
) -> Qwen3MoeExperts:
    """An experts module of Qwen3-MoE with random float32 weights."""
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=experts
    )
    return randomise(Qwen3MoeExperts(config), seed=seed)


def randomise(module: Any, *, seed: int = 0) -> Any:
    """Fill all parameters of a module with reproducible normals; returns the module."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(values.to(parameter.dtype))
    return module.requires_grad_(False).eval()


def experts_layer(index: int, module: Any) -> ExpertsLayer:
    """Describe an experts module that holds its weights."""
    names = expert_parameter_names(module)
    shapes = {
        name: (tuple(getattr(module, name).shape[1:]), getattr(module, name).dtype)
        for name in names
    }
    return ExpertsLayer(
        index=index,
        name=f"model.layers.{index}.mlp.experts",
        module=module,
        num_experts=getattr(module, names[0]).shape[0],
        layout=ExpertLayout.from_shapes(shapes),
    )


class ModuleSource:
    """The records of experts modules, as a `RecordSource`."""

    fingerprint = "0" * 64
    name = "modules"

    def __init__(self, layers: Sequence[ExpertsLayer], top_k: int) -> None:
        self.layers = tuple(layer.store_layer for layer in layers)
        self.top_k = top_k
        self.source_files: dict[str, tuple[int, int]] = {}
        self.content: Any = None
        self._modules = [layer.module for layer in layers]

    def fill(self, layer: int, expert: int, record: Tensor) -> None:
        for name, view in self.layers[layer].layout.views(record).items():
            view.copy_(getattr(self._modules[layer], name)[expert])


def ram_store(layers: Sequence[ExpertsLayer], *, top_k: int = K) -> RamStore:
    return RamStore.from_source(ModuleSource(layers, top_k), progress=False)


class SlowStore(ExpertStore):
    """A store "on disk" whose reads take a while, can be held, and can fail.

    Attributes:
        reads: (layer, expert) of every read that began, in order.
        before_read: called in the reader thread with (layer, expert); may block or raise.
    """

    kind = "disk"

    def __init__(self, records: RamStore, *, delay_s: Callable[[], float] = lambda: 0.0) -> None:
        super().__init__(records.layers, fingerprint=records.fingerprint, top_k=records.top_k)
        self.reads: list[tuple[int, int]] = []
        self.before_read: Callable[[int, int], None] = lambda layer, expert: None
        self.closed = False
        self._records = records
        self._delay_s = delay_s
        self._mutex = threading.Lock()

    def read_into(self, layer: int, expert: int, record: Any) -> None:
        with self._mutex:
            if self.closed:
                raise StoreError("the store is closed")
            self.reads.append((layer, expert))
            delay_s = self._delay_s()
        self.before_read(layer, expert)
        if delay_s:
            time.sleep(delay_s)
        self._records.read_into(layer, expert, record)

    def close(self) -> None:
        self.closed = True


def wait_until_reads_began(session: Session) -> None:
    """Wait until no read from a session's `SlowStore` waits for a reader any more."""
    total, store = session.stats.total, session.store
    assert isinstance(store, SlowStore)
    started = total.prefetches - total.cancelled_prefetches + total.misses
    while len(store.reads) < started:
        time.sleep(0.0005)


def let_waits_last(session: Session, wait_s: float) -> None:
    """Give a session a clock that stands still, except that its first wait for a read takes time.

    Every read of that step has begun before the wait and ends with it, after `wait_s` seconds.
    """
    transfer, store = session.engine.transfer, session.store
    assert transfer is not None and isinstance(store, SlowStore)
    waiting, wait_any = threading.Event(), transfer.wait_any
    store.before_read = lambda layer, expert: waiting.wait(PATIENCE_S) and None

    def wait(awaited: Iterable[Read]) -> Read:
        wait_until_reads_began(session)
        waiting.set()
        return wait_any(awaited)

    transfer.now_s = lambda: wait_s if waiting.is_set() else 0.0  # type: ignore[method-assign]
    transfer.wait_any = wait  # type: ignore[method-assign]


def random_delays(seed: int, *, most_s: float = 0.001) -> Callable[[], float]:
    """Delays of 0..most_s, a third of them none at all."""
    generator = random.Random(seed)
    return lambda: max(0.0, generator.uniform(-0.5, 1.0)) * most_s


def token_batch(
    seed: int, tokens: int, *, experts: int = E, top_k: int = K, hidden: int = H
) -> tuple[Tensor, Tensor, Tensor]:
    """Random x [T, H], distinct ids [T, K] int64 and weights [T, K] that sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator)
    scores = torch.rand(tokens, experts, generator=generator)
    ids = scores.topk(top_k, dim=-1).indices
    weights = torch.rand(tokens, top_k, generator=generator) + 0.1
    return x, ids, weights / weights.sum(dim=-1, keepdim=True)


def reference(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Hugging Face's own result for a module that holds its weights."""
    return grouped_mm_experts_forward(module, x, ids, weights)
