"""`generate` that launches the next step before it has read the token of this one.

The loop of transformers asks after each token whether to stop, and so waits for the GPU, which then
waits for the host. Here a step goes

    choose token n from its scores; copy "is it over?" to the host; launch forward n+1;
    wait for the copy; give token n to the streamer; stop, or choose token n+1

and the GPU computes forward n+1 while the host reads token n. Nothing but that one forward call is
early: processors, stopping criteria and random numbers come in transformers' own order and see
what they would have seen, whatever they do. What was one step too far is dropped: its scores are
never looked at, and a cache that the caller keeps goes back by one token. Where the last step is
known beforehand (a length), none is too far. On the CPU, where a step is over when its call
returns, nothing is launched early; nor is a model's first step, which may compile for a minute,
where a streamer waits for the token before it.

`generate` prepares everything and ends here through transformers' `custom_generate`; other ways of
decoding (beams, assistants, ...) go their own way.

Shape letters: B sequences, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specmoe_compile.hf.cache_names import CACHE_ARGUMENTS
from specmoe_compile.hf.gpu_memory import naming_what_did_not_fit
from specmoe_compile.hf.guard_checks import Repeats
from specmoe_compile.hf.ranks import ranks_of_or_none
from specmoe_compile.hf.step_inputs import StepInputs, cache_of
from specmoe_compile.runtime.cache.statistics import GenerationStats
from specmoe_compile.runtime.session import Session, get_session

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_RECORDED = ("output_attentions", "output_hidden_states")
_stats: weakref.WeakKeyDictionary[Session, GenerationStats] = weakref.WeakKeyDictionary()
_stepped: weakref.WeakSet[Session] = weakref.WeakSet()
"""Sessions whose model has made a step after a prompt."""


def install_run_ahead(model: nn.Module) -> None:
    """Give a model that can generate a `generate` that runs ahead where it can."""
    if not hasattr(model, "generate"):
        return
    generate = functools.partial(_generate, weakref.ref(model))
    functools.update_wrapper(generate, type(model).generate)  # type: ignore[attr-defined]
    model.generate = generate  # type: ignore[assignment]


def generation_stats(session: Session) -> GenerationStats:
    """How the tokens of a session's model were launched so far, as a copy."""
    return copy.copy(_stats.get(session, GenerationStats()))


def reset_generation_stats(session: Session) -> None:
    """Set the counters of `generation_stats` to zero."""
    _stats.pop(session, None)


def _stats_of(model: nn.Module) -> GenerationStats:
    session = get_session(model.__dict__["_specmoe_session"])
    return _stats.setdefault(session, GenerationStats())


def runs_ahead_on(device: torch.device) -> bool:
    """Whether a call on the device returns before its work is done."""
    return device.type == "cuda"


def _generate(reference: weakref.ref[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """`GenerationMixin.generate` with a loop that runs ahead; the same arguments and results.

    Raises:
        SpecMoEError: keys and values, or what else a step needs, do not fit the GPU's memory.
    """
    model: Any = reference()
    assert model is not None, "generate() reached a model that is gone"
    plain: Callable[..., Any] = functools.partial(type(model).generate, model)
    given = inspect.signature(plain).bind_partial(*args, **kwargs).arguments
    given.update(given.pop("kwargs", {}))
    stats: GenerationStats = _stats_of(model)
    reason = _why_not(model, given)
    stats.reason = reason
    ranks = ranks_of_or_none(model)
    with contextlib.ExitStack() as together:
        if ranks is not None:
            ranks.begin_call(given, model.device)
            together.enter_context(ranks.explained())
        session = get_session(model.__dict__["_specmoe_session"])
        together.enter_context(naming_what_did_not_fit(session))
        if reason is not None:
            return plain(*args, **kwargs)
        decode = functools.partial(_decode, streamer=given.get("streamer"))
        return plain(**_with_stop_strings(model, given), custom_generate=decode)


def _why_not(model: Any, given: dict[str, Any]) -> str | None:
    """Why a call takes transformers' own loop; None where it need not."""
    if given.get("custom_generate") is not None:
        return "it has a custom_generate of its own"
    if given.get("synced_gpus"):
        return "its GPUs are synchronised by transformers"
    if model.config.is_encoder_decoder:
        return "the model is an encoder and a decoder"
    config = _merged_config(model, given)
    if config is None:
        return "its generation settings are not valid"
    if config.get_generation_mode(given.get("assistant_model")) not in _MODES:
        return "it neither takes the best token nor samples"
    if config.token_healing:
        return "it heals tokens"
    if config.use_cache is False:
        return "it uses no cache"
    if config.return_dict_in_generate and any(getattr(config, name) for name in _RECORDED):
        return "it records attention or hidden states"
    return None


def _merged_config(model: Any, given: dict[str, Any]) -> Any:
    """The generation settings that apply to a call, or None if they are not valid."""
    config = copy.deepcopy(model.generation_config)
    own = given.get("generation_config")
    try:
        if own is not None:
            config.update(**{k: v for k, v in own.to_dict().items() if v is not None})
        config.update(**given)
    except (TypeError, ValueError):
        return None
    return config


def _with_stop_strings(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The same call with stopping strings as a criterion.

    Beside a custom loop, transformers loses the tokenizer that it would make the criterion with.
    """
    given = dict(given)
    tokenizer = given.pop("tokenizer", None)
    given.pop("assistant_tokenizer", None)
    own = given.get("generation_config")
    strings = given.get("stop_strings")
    if strings is None and own is not None:
        strings = own.stop_strings
    if strings is None:
        strings = model.generation_config.stop_strings
    if strings is None or tokenizer is None:
        return given
    given.pop("stop_strings", None)
    # An empty list is not None, so that the model's own setting does not apply, and stops nothing.
    config = copy.deepcopy(own if own is not None else model.generation_config)
    config.stop_strings = None
    criterion = StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)
    given["generation_config"] = config
    given["stopping_criteria"] = StoppingCriteriaList(
        [*(given.get("stopping_criteria") or ()), criterion]
    )
    return given


class _HostCopy:
    """What the host wants to know of a step, on its way from the device."""

    def __init__(self, like: Tensor) -> None:
        """Reserve for tokens like `like`, [B, length]."""
        self._is_there = like.device.type == "cpu"
        on_gpu = like.device.type == "cuda"
        self._over: Tensor | bool = torch.zeros((), dtype=torch.bool, pin_memory=on_gpu)
        self._tokens = torch.zeros(len(like), dtype=like.dtype, pin_memory=on_gpu)
        self._arrived = torch.cuda.Event() if on_gpu else None

    def begin(self, over: Tensor | bool, tokens: Tensor | None) -> None:
        """Start copying whether all is over, and tokens [B] for a streamer."""
        if self._is_there:
            self._over = over
            self._tokens = self._tokens if tokens is None else tokens
            return
        assert isinstance(self._over, Tensor) and isinstance(over, Tensor), "it is on the device"
        self._over.copy_(over, non_blocking=True)
        if tokens is not None:
            self._tokens.copy_(tokens, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    def wait(self) -> tuple[bool, Tensor]:
        """Whether all is over, and the tokens; waits for them and for nothing later."""
        if self._is_there:
            return bool(self._over), self._tokens
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._over), self._tokens.clone()


class _Chooser:
    """Chooses tokens from scores, as transformers does, and keeps what the caller asked for."""

    def __init__(self, processor: Any, config: Any, criteria: Any, tokens: Tensor) -> None:
        """Start with the prompt, [B, length]."""
        self._processor, self._config = processor, config
        self._criteria = criteria
        keeps = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if keeps and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if keeps and config.output_logits else None
        self._pads = len(tokens) > 1 and any(hasattr(c, "eos_token_id") for c in criteria)
        padding = config._pad_token_tensor
        self._padding = padding.to(tokens.device) if padding is not None else None
        # With one sequence and nothing but a length there is nothing to ask the device for.
        self.asks = any(not isinstance(c, MaxLengthCriteria) for c in criteria)
        self.unfinished = torch.ones(len(tokens), dtype=torch.long, device=tokens.device)
        self._ends, self._is_over = _ends_or_none(criteria, tokens), False

    def choose(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """The next token of each sequence, [B], from the model's logits, [B, 1 or more, V]."""
        last = logits.select(1, -1)
        if not self._processor and not self._config.do_sample and self._keeps_nothing:
            chosen = last.argmax(dim=-1).to(tokens.device)
        else:
            chosen = self._from_scores(last.to(tokens.device, torch.float32, copy=True), tokens)
        if self._pads:
            assert self._padding is not None, "transformers sees to a padding token"
            chosen = chosen * self.unfinished + self._padding * (1 - self.unfinished)
        return chosen

    @property
    def _keeps_nothing(self) -> bool:
        return self.scores is None and self.logits is None

    def _from_scores(self, logits: Tensor, tokens: Tensor) -> Tensor:
        scores: Tensor = self._processor(tokens, logits)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if self._config.do_sample:
            return torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        return scores.argmax(dim=-1)

    @property
    def is_over(self) -> Tensor | bool:
        """Whether all sequences have ended."""
        return self.unfinished.max() == 0 if self._ends is None else self._is_over

    def finish(self, tokens: Tensor, chosen: Tensor) -> None:
        """Ask the criteria which sequences end with `chosen`, [B], the last of `tokens`."""
        if self._ends is not None:
            self._is_over = int(chosen) in self._ends
        elif self.asks:
            self.unfinished = self.unfinished & ~self._criteria(tokens, self.scores)


def _ends_or_none(criteria: Any, tokens: Tensor) -> frozenset[int] | None:
    """The tokens that end one sequence on the host, where criteria ask for these and a length."""
    if tokens.device.type != "cpu" or len(tokens) != 1:
        return None
    ends: set[int] = set()
    lengths = 0
    for criterion in criteria:
        if type(criterion) is EosTokenCriteria:
            ends.update(criterion.eos_token_id.tolist())
        elif type(criterion) is MaxLengthCriteria and _is_within(criterion):
            lengths += 1
        else:
            return None
    return frozenset(ends) if lengths <= 1 else None


def _is_within(criterion: MaxLengthCriteria) -> bool:
    """Whether a length is one that transformers does not warn of."""
    most = criterion.max_position_embeddings
    return most is None or criterion.max_length <= most


def _decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """The loop, as a `custom_generate` of transformers."""
    stats: GenerationStats = _stats_of(model)
    chooser = _Chooser(logits_processor, generation_config, stopping_criteria, input_ids)
    on_host, steps = _HostCopy(input_ids), StepInputs(model)
    most, tokens = stopping_criteria.max_length, input_ids
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    ahead = runs_ahead_on(input_ids.device) and _can_go_back(outputs, generation_config, stats)
    loop = Repeats()
    session = get_session(model.__dict__["_specmoe_session"])

    def step(tokens: Tensor, model_kwargs: dict[str, Any]) -> Any:
        inputs = steps.make(tokens, model_kwargs)
        with loop.step(repeats=steps.repeats):
            outputs = model(**inputs, return_dict=True)
        _stepped.add(session)
        return outputs

    while True:
        if not steps.advances:
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        chosen = chooser.choose(outputs.logits, tokens)
        del outputs  # the logits of a long prompt are large
        tokens = torch.cat([tokens, chosen[:, None]], dim=-1)
        chooser.finish(tokens, chosen)
        is_last = most is not None and tokens.shape[1] >= most
        reads = chooser.asks or streamer is not None
        if reads:
            on_host.begin(chooser.is_over, chosen if streamer is not None else None)
        early = ahead and not is_last and (streamer is None or session in _stepped)
        if early:
            outputs = step(tokens, model_kwargs)
        over, on_cpu = on_host.wait() if reads else (False, tokens)
        stats.tokens += 1
        if streamer is not None:
            streamer.put(on_cpu)
        if over or is_last:
            break
        stats.ahead += early
        if not early:
            outputs = step(tokens, model_kwargs)
    if early:
        stats.dropped += 1
        _go_back(cache_of(model_kwargs), generation_config)
    if streamer is not None:
        streamer.end()
    return _result(generation_config, chooser, tokens, cache_of(model_kwargs))


def _can_go_back(outputs: Any, config: Any, stats: GenerationStats) -> bool:
    """Whether a step too many can be undone, or leaves nothing that the caller would see."""
    cache = cache_of(outputs)
    if cache is None or not _is_kept(cache, config):
        return True
    can = _counts_tokens(cache) or (
        getattr(cache, "is_croppable", False)
        and not any(hasattr(layer, "record_past") for layer in cache.layers)
    )
    if not can:
        stats.reason = "the caller keeps its cache, which cannot go back by a token"
    return can


def _is_kept(cache: Any, config: Any) -> bool:
    return bool(config.return_dict_in_generate or getattr(cache, "_is_user_defined", False))


def _counts_tokens(cache: Any) -> bool:
    """Whether a cache forgets its last token by counting one token less."""
    return all(type(layer) is StaticLayer for layer in cache.layers)


def _go_back(cache: Any, config: Any) -> None:
    """Let a cache that the caller keeps forget its last token."""
    if cache is None or not _is_kept(cache, config):
        return
    if not _counts_tokens(cache):
        cache.crop(-1)
        return
    for layer in cache.layers:
        layer.cumulative_length.sub_(1)


def _result(config: Any, chooser: _Chooser, tokens: Tensor, cache: Any) -> Any:
    if not config.return_dict_in_generate:
        return tokens
    known = GenerateDecoderOnlyOutput.__dataclass_fields__
    name = next(name for name in CACHE_ARGUMENTS if name in known)
    found: dict[str, Any] = {"sequences": tokens, name: cache}
    return GenerateDecoderOnlyOutput(**found, scores=chooser.scores, logits=chooser.logits)  # type: ignore[arg-type]
