"""Decoding of a text that is there already, through `generate`."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor


class GivenText(LogitsProcessor):
    """Makes `generate` go along a given text, so that the model decodes real text."""

    def __init__(self, text: torch.Tensor) -> None:
        self._text = text

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._text[input_ids.shape[1]]] = 0.0
        return forced
