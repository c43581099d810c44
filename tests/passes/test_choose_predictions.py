"""Which layer is predicted from which, and why the others are not."""

from __future__ import annotations

import torch
from torch import Tensor

from specmoe_compile.passes.choose_predictions import (
    FIRST_LAYER,
    PREFILL,
    RESIDENT,
    SKIPPED,
    choose_predictions,
)
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import MoELayer
from tests.passes.graphs import HIDDEN, OPS, TOKENS, find, norm, plain_block, route, trace


def _indices(paths: list[list[MoELayer]]) -> list[list[int]]:
    return [[layer.index for layer in path] for path in paths]


def _chosen(config: PassConfig, layers: int = 4) -> tuple[list[list[int]], dict[int, str]]:
    gm = trace(plain_block, layers=layers)
    plan = find(gm, config)
    report = choose_predictions(gm.graph, config, plan)
    assert report.matches == len(plan.paths)
    return _indices(plan.paths), report.skipped


def test_every_layer_but_the_first_is_predicted_from_the_one_before() -> None:
    assert _chosen(PassConfig()) == ([[0, 1], [1, 2], [2, 3]], {0: FIRST_LAYER})


def test_lookahead_goes_further_back_and_stops_at_the_first_layer() -> None:
    paths, _ = _chosen(PassConfig(lookahead=2))
    assert paths == [[0, 1], [0, 1, 2], [1, 2, 3]]


def test_skipped_layers_are_sources_still() -> None:
    paths, skipped = _chosen(PassConfig(skip_layers=(1, 3)))
    assert paths == [[1, 2]]
    assert skipped == {0: FIRST_LAYER, 1: SKIPPED, 3: SKIPPED}


def test_layers_without_misses_are_not_predicted_and_predict_others() -> None:
    paths, skipped = _chosen(PassConfig(resident_layers=(1, 2)))
    assert paths == [[2, 3]]
    assert skipped == {0: FIRST_LAYER, 1: RESIDENT, 2: RESIDENT}
    config = PassConfig(resident_layers=(1, 2))
    assert config.key() != PassConfig().key(), "compiled code is not another session's"


def test_prefill_is_not_predicted() -> None:
    assert _chosen(PassConfig(max_tokens=TOKENS))[0] == [[0, 1], [1, 2], [2, 3]]
    paths, skipped = _chosen(PassConfig(max_tokens=TOKENS - 1))
    assert paths == []
    assert skipped == {0: FIRST_LAYER, 1: PREFILL, 2: PREFILL, 3: PREFILL}


def test_control_needs_no_source() -> None:
    assert _chosen(PassConfig(control=True))[0] == [[1], [2], [3]]


def test_layer_without_residual_is_neither_target_nor_source() -> None:
    def no_residual(r: Tensor, gate: Tensor, layer: int) -> Tensor:
        x = norm(r)
        return OPS.experts(x, *route(x, gate), 0, layer)

    plan = find(trace([plain_block, no_residual, plain_block, plain_block]))
    assert _indices(plan.paths) == [[2, 3]]
    assert "no residual stream" in (plan.layers[1].reason or "")


def test_reason_names_the_layer_that_the_prediction_needs() -> None:
    def no_residual(r: Tensor, gate: Tensor, layer: int) -> Tensor:
        x = norm(r)
        return OPS.experts(x, *route(x, gate), 0, layer)

    gm = trace([plain_block, no_residual, plain_block])
    report = choose_predictions(gm.graph, PassConfig(), find(gm))
    assert report.skipped[2].startswith("it would be predicted from MoE layer 1, where no addition")


def test_models_of_two_sessions_do_not_predict_each_other() -> None:
    def of_session(session: int) -> object:
        def block(r: Tensor, gate: Tensor, layer: int) -> Tensor:
            x = norm(r)
            return r + OPS.experts(x, *route(x, gate), session, layer // 2)

        return block

    first, second = of_session(3), of_session(4)
    plan = find(trace([first, second, first, second], r=torch.randn(TOKENS, HIDDEN)))  # type: ignore[list-item]
    assert [[layer.session for layer in path] for path in plan.paths] == [[3, 3], [4, 4]]
    assert _indices(plan.paths) == [[0, 1], [0, 1]]
