"""The ops of namespace `specmoe`: what a rewritten graph calls.

Each op names a session by its handle and a MoE layer by its ordinal, and hands the work to that
`Session`; the graph holds no weights, streams or events.

`start_prefetch` and `wait_prefetch` act on the session and not on their arguments: they are marked
side-effecting, so that dead-code removal keeps them, and ordered by data edges (ticket, state,
`after`), never by a mutation that does not happen.

Shape letters: T tokens, E experts, K top-k, H hidden, I inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from specmoe_compile.runtime.session import get_session

_LIBRARY = torch.library.Library("specmoe", "DEF")

_SCHEMAS = {
    "experts": "(Tensor x, Tensor ids, Tensor weights, int session, int layer) -> Tensor",
    "blend_default_vectors": (
        "(Tensor ids, Tensor weights, Tensor like, int session, int layer) -> Tensor"
    ),
    "predict_experts": ("(Tensor state, int session, int layer, int width) -> (Tensor, Tensor)"),
    "start_prefetch": (
        "(Tensor ids, Tensor weights, int session, int layer, Tensor[] after) -> Tensor"
    ),
    "plan_step": "(Tensor ids, int session, int[] layers, int[] edges) -> Tensor",
    "wait_prefetch": "(Tensor ticket, Tensor ids, int session, int layer) -> Tensor",
    "run_resident_experts": (
        "(Tensor x, Tensor ids, Tensor weights, Tensor state, int session, int layer,"
        " Tensor[] after) -> Tensor"
    ),
    "correct_experts": (
        "(Tensor partial, Tensor x, Tensor ids, Tensor weights, Tensor state, int session,"
        " int layer) -> Tensor"
    ),
    "run_own_experts": (
        "(Tensor x, Tensor slots, Tensor weights, int session, int layer, Tensor[] counted,"
        " int[] layers) -> Tensor"
    ),
    "products": "(Tensor x, Tensor[] weights, Tensor[] biases, int session) -> Tensor[]",
    "written": "(Tensor(a!)[] tensors) -> ()",
}

_PYTHON_ONLY = ("predict_experts", "run_own_experts", "written")


def _names(name: str) -> tuple[str, ...]:
    """An op, and the one that gets what the op's body in C++, on a CPU, leaves to Python."""
    return (name,) if name in _PYTHON_ONLY else (name, f"{name}_python")


for _name, _schema in _SCHEMAS.items():
    for _op in _names(_name):
        _LIBRARY.define(_op + _schema)


def _check_routing(op: str, ids: Tensor, weights: Tensor) -> None:
    if ids.dim() != 2 or ids.shape != weights.shape:
        raise ValueError(
            f"specmoe::{op}: ids {tuple(ids.shape)} and weights {tuple(weights.shape)} must both"
            " be [tokens, top_k]"
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"specmoe::{op}: ids are {ids.dtype}, expected int64 or int32")


def _check_tokens(op: str, x: Tensor, ids: Tensor, weights: Tensor) -> None:
    _check_routing(op, ids, weights)
    if x.dim() != 2 or x.shape[0] != ids.shape[0]:
        raise ValueError(
            f"specmoe::{op}: x {tuple(x.shape)} must be [tokens, hidden] with as many tokens as"
            f" ids {tuple(ids.shape)}"
        )


def _token(number: int, like: Tensor) -> Tensor:
    """The tensor that carries a ticket's or state's number through the graph, int64 [1].

    On a GPU the number stays on the host (the session keeps one per layer, in order of execution)
    and the tensor is only the data edge: writing the number would be a copy in every step, reading
    it back a synchronisation.
    """
    if like.is_cuda:
        return like.new_empty(1, dtype=torch.int64)
    return torch.full((1,), number)  # a third cheaper than torch.tensor


def _number(token: Tensor) -> int:
    return -1 if token.is_cuda else int(token)


def _experts(x: Tensor, ids: Tensor, weights: Tensor, session: int, layer: int) -> Tensor:
    """Run the experts of one layer: [T,H], [T,K], [T,K] -> [T,H], fetching what is missing."""
    return get_session(session).experts(layer, x, ids, weights)


def _experts_fake(x: Tensor, ids: Tensor, weights: Tensor, *_: Any) -> Tensor:
    _check_tokens("experts", x, ids, weights)
    return x.new_empty(x.shape)


def _blend(ids: Tensor, weights: Tensor, like: Tensor, session: int, layer: int) -> Tensor:
    """Weighted sum of the experts' default vectors, [T,K], [T,K] -> [T,H] in `like`'s dtype."""
    return get_session(session).blend_default_vectors(layer, ids, weights, like)


def _blend_fake(ids: Tensor, weights: Tensor, like: Tensor, *_: Any) -> Tensor:
    _check_routing("blend_default_vectors", ids, weights)
    return like.new_empty(like.shape)


def _predict(state: Tensor, session: int, layer: int, width: int) -> tuple[Tensor, Tensor]:
    """Experts that the session predicts for a layer: [..,H] -> ids int64, weights float32 [T,P]."""
    return get_session(session).predict_experts(layer, state.reshape(-1, state.shape[-1]), width)


def _predict_fake(state: Tensor, session: int, layer: int, width: int) -> tuple[Tensor, Tensor]:
    shape = (state.reshape(-1, state.shape[-1]).shape[0], width)
    return (
        state.new_empty(shape, dtype=torch.int64),
        state.new_empty(shape, dtype=torch.float32),
    )


def _start(
    ids: Tensor, weights: Tensor, session: int, layer: int, after: Sequence[Tensor]
) -> Tensor:
    """Start fetching predicted experts; returns a ticket, int64 [1] on the device of `ids`.

    `after` holds states of layers whose misses must have been requested first.
    """
    return _token(get_session(session).start_prefetch(layer, ids, weights), ids)


def _start_fake(ids: Tensor, weights: Tensor, *_: Any) -> Tensor:
    _check_routing("start_prefetch", ids, weights)
    return ids.new_empty(1, dtype=torch.int64)


def _wait(ticket: Tensor, ids: Tensor, session: int, layer: int) -> Tensor:
    """Settle a ticket against the true ids and start demand reads; returns a state, int64 [1]."""
    return _token(get_session(session).wait_prefetch(_number(ticket), layer, ids), ids)


def _wait_fake(ticket: Tensor, ids: Tensor, *_: Any) -> Tensor:
    return ids.new_empty(1, dtype=torch.int64)


def _plan_step(ids: Tensor, session: int, layers: Sequence[int], edges: Sequence[int]) -> Tensor:
    """Which of `layers` speculate in this step, bool [len(layers)]; on the CPU, whatever `ids` are.

    `edges` holds pairs: a layer, and one that can be predicted from it. `ids`, [T, K], are the
    experts of the first layer.
    """
    answers = get_session(session).plan_step(layers, edges, ids)
    if all(answer == answers[0] for answer in answers):
        return torch.full((len(answers),), answers[0])  # the usual case, and much cheaper
    return torch.tensor(answers)


def _plan_step_fake(ids: Tensor, session: int, layers: Sequence[int], *_: Any) -> Tensor:
    return torch.empty(len(layers), dtype=torch.bool)


def _run_resident(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    state: Tensor,
    session: int,
    layer: int,
    after: Sequence[Tensor],
) -> Tensor:
    """Run the experts that are here: unweighted outputs [T,K,H]; missing rows are undefined.

    `after` holds tickets of prefetches that must have been issued first.
    """
    return get_session(session).run_resident_experts(layer, x, ids, weights, _number(state))


def _run_resident_fake(x: Tensor, ids: Tensor, weights: Tensor, *_: Any) -> Tensor:
    _check_tokens("run_resident_experts", x, ids, weights)
    return x.new_empty((*ids.shape, x.shape[-1]))


def _correct(
    partial: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    state: Tensor,
    session: int,
    layer: int,
) -> Tensor:
    """Run the experts that arrived late, blend skipped ones, reduce over K: [T,H]."""
    return get_session(session).correct_experts(layer, partial, x, ids, weights, _number(state))


def _correct_fake(partial: Tensor, x: Tensor, ids: Tensor, weights: Tensor, *_: Any) -> Tensor:
    _check_tokens("correct_experts", x, ids, weights)
    return x.new_empty(x.shape)


def _run_own(
    x: Tensor,
    slots: Tensor,
    weights: Tensor,
    session: int,
    layer: int,
    counted: Sequence[Tensor],
    layers: Sequence[int],
) -> Tensor:
    """Run a token's experts of a layer that has all of a rank's: [1,H], [1,K], [1,K] -> [1,H].

    -1 is a choice of another rank. `counted` are the slots of `layers`, whose uses are counted now.
    """
    own = dict(zip(layers, counted, strict=True))
    return get_session(session).run_own_experts(layer, x, slots, weights, own)


def _run_own_fake(x: Tensor, slots: Tensor, weights: Tensor, *_: Any) -> Tensor:
    _check_tokens("run_own_experts", x, slots, weights)
    return x.new_empty(x.shape)


def _products(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], session: int
) -> list[Tensor]:
    """Multiply [T,I] with each weight [N,I], plus its bias [N] unless there are none: [T,N] each.

    In C++ the session's engine does so with its own threads.
    """
    if biases:
        return [torch.addmm(b, x, w.t()) for w, b in zip(weights, biases, strict=True)]
    return [torch.mm(x, w.t()) for w in weights]


def _products_fake(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], session: int
) -> list[Tensor]:
    if biases and len(biases) != len(weights):
        raise ValueError(
            f"specmoe::products: {len(biases)} biases for {len(weights)} weights, expected none or"
            " one for each"
        )
    return [x.new_empty((x.shape[0], w.shape[0])) for w in weights]


def _written(tensors: Sequence[Tensor]) -> None:
    """Do nothing: what a graph writes inside a subgraph is told here."""


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "experts": (_experts, _experts_fake),
    "blend_default_vectors": (_blend, _blend_fake),
    "predict_experts": (_predict, _predict_fake),
    "start_prefetch": (_start, _start_fake),
    "plan_step": (_plan_step, _plan_step_fake),
    "wait_prefetch": (_wait, _wait_fake),
    "run_resident_experts": (_run_resident, _run_resident_fake),
    "correct_experts": (_correct, _correct_fake),
    "run_own_experts": (_run_own, _run_own_fake),
    "products": (_products, _products_fake),
    "written": (_written, _written),
}
for _name, (_real, _fake) in _IMPLEMENTATIONS.items():
    for _op in _names(_name):
        _LIBRARY.impl(_op, _real, "CompositeExplicitAutograd")
        torch.library.register_fake(f"specmoe::{_op}", _fake, lib=_LIBRARY)

for _name in ("plan_step", "start_prefetch", "wait_prefetch"):
    has_side_effect(getattr(torch.ops.specmoe, _name).default)
