"""Time to predict one token's experts with each predictor, compiled, beside an empty function."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import specmoe_compile
from specmoe_compile.bench.records import spread
from specmoe_compile.calibrate.calibration import Calibration, use_networks
from specmoe_compile.hf.attach import session_of
from specmoe_compile.predict.registry import PREDICTORS
from specmoe_compile.reference_model import CHECKPOINT_DIR

NOTHING = "nothing"


def measure_cost(artefact: Path) -> dict[str, Any]:
    """Times of predicting all layers but the first of the reference model, one token.

    Args:
        artefact: its calibration, with trained networks.
    """
    model: Any = specmoe_compile.from_pretrained(
        CHECKPOINT_DIR, device="cpu", dtype="float32", store="ram", progress=False
    )
    session = session_of(model)
    calibration = Calibration.load(artefact)
    session.default_vectors.load(calibration.default_vectors)
    samples = _samples(model, session, calibration)
    base = median(samples.pop(NOTHING))
    layers = len(session.layers) - 1
    specmoe_compile.close(model)
    return {
        "layers": layers,
        "threads": torch.get_num_threads(),
        "us_per_token": {
            name: {p: round(v - base, 2) for p, v in spread(us).items()}
            for name, us in samples.items()
        },
    }


@torch.no_grad()
def _samples(model: Any, session: Any, calibration: Calibration) -> dict[str, list[float]]:
    """Microseconds of each call, by predictor."""
    layers = range(1, len(session.layers))
    hidden, top_k = model.config.hidden_size, session.top_k
    states = [torch.randn(1, 1, hidden) for _ in layers]
    ids = torch.arange(top_k).unsqueeze(0)
    weights = torch.full((1, top_k), 1.0 / top_k)
    ops = torch.ops.specmoe

    def quasi(state: Tensor, layer: int) -> Tensor:
        blend: Tensor = ops.blend_default_vectors(
            ids, weights, state.view(1, hidden), session.handle, layer - 1
        )
        return state + blend.view_as(state)

    def router(state: Tensor, layer: int) -> Any:
        block = model.model.layers[layer]
        _, weights, ids = block.mlp.gate(block.post_attention_layernorm(state))
        return ids, weights

    def network(state: Tensor, layer: int) -> Any:
        return ops.predict_experts(state, session.handle, layer, top_k)

    kinds: dict[str, Callable[[Tensor, int], Any]] = {
        NOTHING: lambda state, layer: (state + 1.0,),
        "residual": router,
        "default_vectors": lambda state, layer: router(quasi(state, layer), layer),
        "previous_token": network,
        "pre_attention": network,
        "estimator": lambda state, layer: network(quasi(state, layer), layer),
    }
    samples: dict[str, list[float]] = {}
    for name, predict in kinds.items():
        if name != NOTHING:
            session.predictions.use(PREDICTORS[name])
            use_networks(session, calibration, name)
            for layer in layers:
                session.predictions.note(layer, ids)
        # Compiled from the aten graph: Dynamo's guards, more for some than for others, are no part
        # of a prediction.
        traced = make_fx(_all_layers(predict, layers))(*states)
        samples[name] = _time_us(torch._inductor.compile(traced, [*states]), states)
    return samples


def _all_layers(
    predict: Callable[[Tensor, int], Any], layers: Sequence[int]
) -> Callable[..., list[Tensor]]:
    def run(*states: Tensor) -> list[Tensor]:
        pairs = zip(states, layers, strict=True)
        return [tensor for state, layer in pairs for tensor in predict(state, layer)]

    return run


@torch.no_grad()
def _time_us(run: Callable[..., Any], states: list[Tensor], calls: int = 2000) -> list[float]:
    """Times of `calls` calls in microseconds, after a tenth of them as a warm-up."""
    for _ in range(calls // 10):
        run(*states)
    times = []
    for _ in range(calls):
        started = time.perf_counter_ns()
        run(*states)
        times.append((time.perf_counter_ns() - started) / 1e3)
    return times
