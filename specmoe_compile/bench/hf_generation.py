"""Generation through Hugging Face's `generate`, for models that have it."""

from __future__ import annotations

from typing import Any

from specmoe_compile.bench.timing import TokenClock


class HuggingFaceGenerator:
    """Greedy `generate` of a model, compiled or not, as an `arm.Generator`."""

    def __init__(self, model: Any, inner: Any, kwargs: dict[str, Any]) -> None:
        """Wrap a model.

        Args:
            model: has `generate`.
            inner: the same without the compile wrapper, for its device.
            kwargs: more arguments of `generate`.
        """
        self._model = model
        self._kwargs = kwargs
        self._device = next(inner.parameters()).device
        self._never = inner.config.get_text_config().vocab_size

    def generate(
        self,
        prompt: list[int],
        new_tokens: int,
        clock: TokenClock,
        *,
        stop_at: int | None = None,
        keep_logits: bool = False,
    ) -> tuple[list[int], Any]:
        """As `arm.Generator.generate`."""
        import torch
        from transformers import StoppingCriteriaList

        ids = torch.tensor([prompt], dtype=torch.int64, device=self._device)
        criteria = StoppingCriteriaList()
        if stop_at is not None:
            criteria.append(lambda ids, scores, **_: _all_or_none(ids, ids.shape[1] >= stop_at))
        clock.start()
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            # An end-of-sequence token would end the timing early. One that the model does not have
            # is looked for as any other; `min_new_tokens` would be a dozen operations per token.
            eos_token_id=self._never,
            pad_token_id=0,
            do_sample=False,
            streamer=clock,
            stopping_criteria=criteria,
            return_dict_in_generate=True,
            output_logits=keep_logits,
            **self._kwargs,
        )
        logits = torch.cat(out.logits).float().cpu() if keep_logits else None
        return out.sequences[0, len(prompt) :].tolist(), logits


def _all_or_none(ids: Any, stop: bool) -> Any:
    """What a stopping criterion returns: one flag per sequence."""
    import torch

    return torch.full((ids.shape[0],), stop, dtype=torch.bool, device=ids.device)
