"""The engine of a plain model: experts run from the modules' own parameters, nothing is moved.

A model that was not offloaded has all its experts in the fast tier already. Its dispatch nodes name
the session of a `LiveEngine`, which holds the modules by weak reference and keeps nothing of theirs
alive. Their graphs are not rewritten, so that of a step only `demand` is called.

Shape letters: T tokens, K top-k, H hidden.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from specmoe_compile.errors import SpecMoEError
from specmoe_compile.options import SessionOptions
from specmoe_compile.predict.default_vectors import DefaultVectors
from specmoe_compile.predict.predictions import Predictions
from specmoe_compile.runtime.cache.statistics import Stats
from specmoe_compile.runtime.cpu.experts import ExpertRunner, Routing, reduce_experts
from specmoe_compile.runtime.cpu.native.layer import use_cpu_math
from specmoe_compile.runtime.experts.formats.expert_format import ExpertTensors
from specmoe_compile.runtime.experts.formats.weight_code import WeightPlanes
from specmoe_compile.runtime.experts.module import find_experts_layers
from specmoe_compile.runtime.session import Session


class LiveEngine:
    """Runs plain experts modules where they are."""

    device = torch.device("cpu")
    fetches = False
    resident_layers: frozenset[int] = frozenset()
    foreign_ids: Mapping[int, int] = MappingProxyType({})
    direct_steps = None
    survives_fork = True
    prefetch_pays = False
    plans_steps = False
    multiplies = False

    def __init__(self) -> None:
        self.default_vectors = DefaultVectors([], [])
        self.predictions = Predictions(0)
        self._modules: list[weakref.ref[nn.Module]] = []
        self._cpu: dict[int, _CpuLayer] = {}

    def add(self, module: nn.Module) -> int:
        """Take a module in and return its layer number in this session."""
        self._modules.append(weakref.ref(module))
        return len(self._modules) - 1

    def demand(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Run one layer: x [T,H], ids [T,K], weights [T,K] -> [T,H].

        Raises:
            SpecMoEError: the module is gone.
        """
        module = self._modules[layer]()
        if module is None:
            raise SpecMoEError(
                "the model that this compiled function was made for is gone: compile it again"
            )
        if x.device.type != "cpu":
            from transformers.integrations.moe import grouped_mm_experts_forward

            return grouped_mm_experts_forward(module, x, ids, weights)
        state = self._cpu.get(layer)
        if state is None or not state.is_current(module):
            state = self._cpu[layer] = _CpuLayer(module)
        return state.run(x, ids, weights)

    def configure(self, speculation: SessionOptions) -> None:
        """Accept run-time options; a model that is all there has nothing to speculate on.

        Raises:
            ValueError: int8 arithmetic, which experts of plain numbers do not have.
        """
        use_cpu_math(speculation.cpu_math, [])

    def _never(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("the graph of a plain model does not speculate")

    blend = predict = start = plan = settle = run = correct = run_own = _never

    def stats(self) -> Stats:
        return Stats(layers=(), fast_tier_bytes=0, store_bytes=0, store="ram", read_busy_ms=0.0)

    def reset_stats(self) -> None:
        pass

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        """Forget the modules."""
        self._modules.clear()
        self._cpu.clear()


class _CpuLayer:
    """Views of one module's parameters, expert by expert, made once."""

    def __init__(self, module: nn.Module) -> None:
        (found,) = find_experts_layers(module)
        self._runner = ExpertRunner(module, found.layout, found.num_experts)
        owner: Any = module
        name = "gate_up_proj" if owner.has_gate else "up_proj"
        up, down = getattr(owner, name), owner.down_proj
        self._key = (up.data_ptr(), down.data_ptr(), up.dtype)
        self._name = name
        if not owner.is_transposed:
            up, down = up.mT, down.mT
        up_bias = getattr(owner, f"{name}_bias", None)
        down_bias = getattr(owner, "down_proj_bias", None)
        self._weights = [
            ExpertTensors(
                WeightPlanes(up[e].detach()),
                None if up_bias is None else up_bias[e].detach(),
                WeightPlanes(down[e].detach()),
                None if down_bias is None else down_bias[e].detach(),
            )
            for e in range(found.num_experts)
        ]

    def is_current(self, module: nn.Module) -> bool:
        """Whether the module still has the parameters that the views were made of."""
        owner: Any = module
        up, down = getattr(owner, self._name), owner.down_proj
        return bool(self._key == (up.data_ptr(), down.data_ptr(), up.dtype))

    def run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Run the layer: [T,H], [T,K], [T,K] -> [T,H]."""
        routing = Routing(x, ids, self._runner)
        y = x.new_empty(ids.numel(), x.shape[-1], dtype=self._runner.dtype)
        experts = [(expert, self._weights[expert]) for expert in routing.experts]
        routing.compute(experts, self._runner, y)
        return reduce_experts(y.view(*ids.shape, x.shape[-1]), weights, x)


_sessions: weakref.WeakKeyDictionary[nn.Module, tuple[Session, int]] = weakref.WeakKeyDictionary()


class LiveModules:
    """Finds the experts modules of a Dynamo graph, and a session for those of one graph."""

    def __init__(self) -> None:
        self._engine = LiveEngine()
        self._session: Session | None = None

    def owner_of(
        self, parameters: Sequence[Any], module_class: type[nn.Module] | str
    ) -> nn.Module | None:
        """Return the live module whose parameters are exactly `parameters`, or None.

        A Dynamo graph holds parameters, not modules, so this looks through the objects that the
        garbage collector tracks; it runs once per layer while compiling.
        """
        wanted = {id(p) for p in parameters}
        if not wanted or isinstance(module_class, str):
            return None
        for candidate in gc.get_objects():
            if type(candidate) is module_class and wanted <= {
                id(p) for p in candidate.parameters(recurse=False)
            }:
                return candidate
        return None

    def session_for(self, module: nn.Module) -> tuple[int, int]:
        """Return a module's session handle and layer; modules of one graph share a session."""
        found = _sessions.get(module)
        if found is None:
            if self._session is None:
                self._session = Session(self._engine)
            found = _sessions[module] = (self._session, self._engine.add(module))
        session, layer = found
        return session.handle, layer
