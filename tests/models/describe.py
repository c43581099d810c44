"""What the manual says about a family: its router and the layout of its experts, by observation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from specmoe_compile.runtime.experts.module import is_experts_module

_ROUTING_OPS = {
    "_softmax": "softmax",
    "sigmoid": "sigmoid",
    "softplus": "softplus",
    "topk": "top-k",
}
_BIAS_NAMES = ("correction_bias", "expert_bias", "routing_bias", "balancing_biases", "gate.bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """One family in words.

    Attributes:
        router: what its router applies to the scores, in order.
        shared_experts: whether experts run on every token beside the routed ones.
        layout: how an expert's weights are stored.
    """

    router: str
    shared_experts: bool
    layout: str


def describe(model: nn.Module, ids: Tensor) -> Description:
    """Describe a model's first MoE layer by running it on `ids`, [1, T] int64."""
    name, experts = next((n, m) for n, m in model.named_modules() if is_experts_module(m))
    block = model.get_submodule(name.rpartition(".")[0])
    siblings = [child for child, _ in block.named_children()]
    recorder = _Recorder()
    with torch.no_grad(), _recording_routing(block, experts, recorder), recorder:
        model(input_ids=ids)
    return Description(
        router=_router(recorder.calls, block, experts),
        shared_experts=any("shared" in child for child in siblings),
        layout=layout_of(experts),
    )


def layout_of(experts: Any) -> str:
    """Describe how an experts module stores its weights."""
    words = ["gated" if experts.has_gate else "not gated"]
    if experts.has_gate and not experts.is_concatenated:
        words.append("interleaved")
    if experts.has_bias:
        words.append("biased")
    if experts.is_transposed:
        words.append("transposed")
    if getattr(experts, "has_post_expert_norm", False):
        words.append("post norm")
    return ", ".join(words)


class _Recorder(TorchDispatchMode):
    """Notes the routing operations that run while `active`."""

    def __init__(self) -> None:
        super().__init__()
        self.active = False
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        if self.active and name in _ROUTING_OPS:
            self.calls.append(_ROUTING_OPS[name])
        return func(*args, **(kwargs or {}))


@contextmanager
def _recording_routing(block: nn.Module, experts: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Record from the start of the MoE block to its experts, but for shared experts."""

    def switch(active: bool) -> Any:
        return lambda *args, **kwargs: setattr(recorder, "active", active)

    hooks = [
        block.register_forward_pre_hook(switch(True)),
        experts.register_forward_pre_hook(switch(False)),
    ]
    for name, child in block.named_children():
        if "shared" in name or "attn" in name or "attention" in name:
            hooks.append(child.register_forward_pre_hook(switch(False)))
            hooks.append(child.register_forward_hook(switch(True)))
    hooks.append(experts.register_forward_hook(_stop(recorder)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _stop(recorder: _Recorder) -> Any:
    """After the first MoE layer nothing is recorded any more."""

    def stop(*args: Any, **kwargs: Any) -> None:
        recorder.calls = _Frozen(recorder.calls)

    return stop


class _Frozen(list[str]):
    def append(self, item: str) -> None:
        return


def _router(calls: list[str], block: nn.Module, experts: nn.Module) -> str:
    words: list[str] = []
    choices = calls.count("top-k")
    for call in calls:
        if call == "top-k" and choices > 1:
            if "groups" not in words:
                words.append("groups")
            choices -= 1
        elif not words or words[-1] != call:
            words.append(call)
    own = {id(tensor) for tensor in experts.parameters()}
    tensors = [*block.named_buffers(), *block.named_parameters()]
    if any(name.endswith(_BIAS_NAMES) and id(t) not in own for name, t in tensors):
        words.append("bias")
    return ", ".join(words)
