"""The network of a trained predictor: a token's state to scores of the target's experts.

    z = x / rms(x)
    estimator      scores = W0 z + W2 silu(W1 z + b1) + b2      quasi-hidden state
    pre_attention  scores =        W2     (W1 z + b1) + b2      state in front of the attention

The estimator follows "Speculating Experts", arXiv 2603.19289, which distils a small network from
the next router by KL divergence; its layers here are our choice. The two linear maps follow
"Pre-Attention Expert Prediction", arXiv 2511.10676; its loss ranks, ours is the same KL divergence
as the estimator's, so that both are trained alike.

Shape letters: T tokens, E experts, P predicted per token, H hidden, R inner width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_EPSILON = 1e-6


@dataclass(slots=True, kw_only=True)
class ExpertNetwork:
    """One target layer's network.

    Attributes:
        inner: W1, [R, H] float32. inner_bias: b1, [R]. outer: W2, [E, R]. outer_bias: b2, [E].
        direct: W0, [E, H], of an estimator; None for linear maps alone.
        weight_sum: what the router's weights of a token sum to on average.
    """

    inner: Tensor
    inner_bias: Tensor
    outer: Tensor
    outer_bias: Tensor
    direct: Tensor | None = None
    weight_sum: float = 1.0

    @classmethod
    def random(
        cls, hidden: int, experts: int, width: int, *, is_linear: bool, generator: torch.Generator
    ) -> ExpertNetwork:
        """A network before training, on the CPU.

        Args:
            hidden: H. experts: E. width: R.
            is_linear: two linear maps alone; else with silu between and a direct map beside.
            generator: draws the weights.
        """

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).div_(shape[-1] ** 0.5)

        return cls(
            inner=draw(width, hidden),
            inner_bias=torch.zeros(width),
            outer=draw(experts, width) if is_linear else torch.zeros(experts, width),
            outer_bias=torch.zeros(experts),
            direct=None if is_linear else draw(experts, hidden),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights by name."""
        names = ("inner", "inner_bias", "outer", "outer_bias", "direct")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def scores(self, state: Tensor, *, is_normalised: bool = False) -> Tensor:
        """Scores of all experts: [T, H] any float -> [T, E] float32."""
        z = state.float() if is_normalised else normalised(state)
        hidden = functional.linear(z, self.inner, self.inner_bias)
        if self.direct is None:
            return functional.linear(hidden, self.outer, self.outer_bias)
        out = functional.linear(functional.silu(hidden), self.outer, self.outer_bias)
        return out + functional.linear(z, self.direct)

    def predict(self, state: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The experts with the highest scores, and router weights for them.

        Args:
            state: [T, H] float.
            width: P.

        Returns:
            ids [T, P] int64, heaviest first, and weights [T, P] float32 that sum to `weight_sum`.
            Beyond E ids are -1, which nobody prefetches, and weights 0.
        """
        scores = self.scores(state)
        missing = max(0, width - scores.shape[-1])
        best = scores.topk(width - missing, dim=-1)
        ids, weights = best.indices, torch.softmax(best.values, dim=-1) * self.weight_sum
        if missing:
            ids = functional.pad(ids, (0, missing), value=-1)
            weights = functional.pad(weights, (0, missing))
        return ids, weights

    def to(self, device: torch.device | str) -> ExpertNetwork:
        """The same network on a device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return ExpertNetwork(**moved, weight_sum=self.weight_sum)


def normalised(state: Tensor) -> Tensor:
    """z = x / rms(x): [.., H] any float -> [.., H] float32."""
    z = state.float()
    return z * torch.rsqrt(z.square().mean(dim=-1, keepdim=True) + _EPSILON)
