"""Train the networks of predictors: record what they read and what the router chose, then distil.

The loss is the KL divergence from the router's choice, its weights of a token scaled to sum to 1
and 0 for experts that it did not choose, to the softmax of the network's scores. That needs nothing
of a router but what the graph has: ids and weights. ("Speculating Experts", arXiv 2603.19289,
distils the router's full distribution.)

Shape letters: T tokens, E experts, K top-k, H hidden, N recorded tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from specmoe_compile.predict.network import ExpertNetwork, normalised

MAX_BYTES = 2 << 30
"""Memory for recorded states; of longer texts a random part of the tokens is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How networks are trained; the same for all of them."""

    epochs: int = 10
    """Times that each recorded token is seen."""
    batch: int = 1024
    """Tokens per step."""
    learning_rate: float = 2e-3
    """Peak, of AdamW; warm-up over a tenth of the steps, then cosine."""
    weight_decay: float = 0.01
    width: int | None = None
    """R, the inner width; None is H, at most 256."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected an integer >= 1")


class Recording:
    """States and choices of the layers of a model, token by token.

    States are kept normalised, as networks read them, in float16: no value exceeds sqrt(H).
    """

    def __init__(self, *, share: float = 1.0, seed: int = 0) -> None:
        """Begin.

        Args:
            share: of the tokens that are kept, drawn at random; 0..1.
            seed: of the draw.
        """
        self._share = share
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: Tensor | None = None
        self._states: dict[tuple[str, int], list[Tensor]] = {}
        self._choices: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def begin(self, tokens: int) -> None:
        """Draw which of a batch's tokens are kept."""
        self._kept = None
        if self._share < 1.0:
            drawn = torch.rand(tokens, generator=self._generator) < self._share
            self._kept = drawn.nonzero().squeeze(1)

    def add_state(self, name: str, layer: int, state: Tensor) -> None:
        """Keep what predictor `name` of a target layer reads, [.., H] float."""
        rows = normalised(self._chosen(state.reshape(-1, state.shape[-1])))
        self._states.setdefault((name, layer), []).append(rows.half().cpu())

    def add_choice(self, layer: int, ids: Tensor, weights: Tensor) -> None:
        """Keep what a layer's router chose, [T, K] and [T, K]."""
        kept = self._chosen(ids).cpu().long(), self._chosen(weights).cpu().float()
        self._choices.setdefault(layer, []).append(kept)

    def _chosen(self, rows: Tensor) -> Tensor:
        return rows if self._kept is None else rows[self._kept.to(rows.device)]

    def layers(self, name: str) -> list[int]:
        """Layers of which there are states for a predictor."""
        return sorted(layer for kept, layer in self._states if kept == name)

    def states(self, name: str, layer: int) -> Tensor:
        """[N, H] float16."""
        return torch.cat(self._states[name, layer])

    def choices(self, layer: int) -> tuple[Tensor, Tensor]:
        """ids [N, K] int64 and weights [N, K] float32."""
        ids, weights = zip(*self._choices[layer], strict=True)
        return torch.cat(ids), torch.cat(weights)


def share_that_fits(tokens: int, states_per_token: int, hidden: int) -> float:
    """The share of tokens whose float16 states fit in MAX_BYTES."""
    return min(1.0, MAX_BYTES / max(1, tokens * states_per_token * hidden * 2))


def train_network(
    states: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    experts: int,
    is_linear: bool,
    config: TrainingConfig,
) -> ExpertNetwork:
    """Train the network of one layer.

    Args:
        states: [N, H] float, normalised.
        ids: [N, K] int64, what the router chose. weights: [N, K] float32, its weights.
        experts: E.
        is_linear: two linear maps; else the estimator's form.
        config: how.

    Returns:
        The network, without gradients.
    """
    generator = torch.Generator().manual_seed(config.seed)
    hidden = states.shape[1]
    network = ExpertNetwork.random(
        hidden,
        experts,
        config.width or min(hidden, 256),
        is_linear=is_linear,
        generator=generator,
    )
    network.weight_sum = float(weights.sum(dim=1).mean())
    shares = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
    parameters = list(network.tensors.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    steps = max(1, config.epochs * len(states) // config.batch)
    optimiser = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, config.learning_rate, total_steps=steps + 1, pct_start=0.1
    )
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(states), (config.batch,), generator=generator)
            scores = network.scores(states[rows], is_normalised=True)
            # KL divergence up to the entropy of the router's choice, which is constant.
            chosen = functional.log_softmax(scores, dim=-1).gather(1, ids[rows])
            loss = -(shares[rows] * chosen).sum(dim=1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return network


def recall_of(network: ExpertNetwork, states: Tensor, ids: Tensor) -> tuple[float, float]:
    """What a network's top-K is worth on tokens that it was not trained on.

    Args:
        network: of the layer.
        states: [N, H] float, normalised. ids: [N, K] int64, the true experts.

    Returns:
        Share of the true experts that it names, and share of tokens of which it names all.
    """
    best = network.scores(states, is_normalised=True).topk(ids.shape[1], dim=-1).indices
    found = (ids.unsqueeze(2) == best.unsqueeze(1)).any(dim=2)
    return float(found.float().mean()), float(found.all(dim=1).float().mean())
