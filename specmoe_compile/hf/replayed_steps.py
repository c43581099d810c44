"""Decode steps that call the compiled graph itself, where Dynamo would only find it again.

What Dynamo does around a graph takes half a millisecond of a step on a CPU, and more than one of 48
layers' on a GPU: it enters the frame, inside what the model's class puts around its forward, asks
what tells two graphs apart, collects parameters and keys from the modules and wraps the results.
Where a step repeats the last one (see `guard_checks`), all of that gives the same objects. So what
one checked step gave its graph is kept and given to it again, if

- two checked steps, one after the other, gave one graph the same objects but for `input_ids`,
- Dynamo's code changes no Python object (it says so while the graph is compiled), and what it
  returns is made of results of the graph and of arguments,
- each of these is a parameter, a buffer, a tensor of the cache or an argument, and still is, but
  for the mesh of a split model's ranks,
- nothing stands in between: no hook of the model, no other stance of `torch.compile`.

On a CPU the first such step is recorded where it can be, and later ones run without Python
(`Tape`). On a GPU the graph is mostly one launch of a CUDA graph, whose memory PyTorch takes for
free again once a new step has begun: Dynamo counts steps, and so such a call counts as one, too.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch._dynamo.mutation_guard import install_generation_tagging_init
from torch.nn.modules import module as modules
from transformers.utils.generic import ModelOutput

from specmoe_compile.system.graph_runs import GraphRun
from specmoe_compile.system.step_tape import Tape, run_recording

FRESH = "input_ids"
"""The argument that is another tensor in each step."""


class _Places:
    """Where a graph's inputs come from, by dictionary and name."""

    def __init__(self, inputs: Iterable[Any]) -> None:
        """Look for these, which have been found nowhere yet."""
        self._missing = {id(value): value for value in inputs}
        self._folders: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._found: list[Any] = []

    @property
    def are_all(self) -> bool:
        """Whether each input was found."""
        return not self._missing

    def add(self, folder: dict[str, Any], name: str) -> None:
        """Keep what lies there."""
        self._folders.append(folder)
        self._names.append(name)
        self._found.append(folder.get(name))

    def search(self, folder: dict[str, Any]) -> None:
        """Keep the inputs that lie there."""
        for name, value in folder.items():
            if id(value) in self._missing:
                del self._missing[id(value)]
                self.add(folder, name)

    def are_unchanged(self) -> bool:
        """Whether everything lies where it was."""
        now = map(dict.get, self._folders, self._names)
        return all(map(operator.is_, now, self._found))


def _settings() -> tuple[Any, ...]:
    """What holds in a thread and decides how a tensor operation runs, hooks and modes included."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch._C._len_torch_function_stack(),
        eval_frame._stance.stance,
        eval_frame._stance.backend,
        eval_frame._stance.skip_guard_eval_unsafe,
        bool(modules._has_any_global_hook()),
    )


_QUIET = ("default", None, False, False)
"""The end of `_settings` where nothing stands between a call and its graph."""


@dataclass(frozen=True, slots=True)
class CheckedStep:
    """A step that Dynamo checked in full, as the graph saw it.

    Attributes:
        call: the forward call through `torch.compile`.
        arguments: its keyword arguments.
        run: the graph.
        fresh: which of the graph's inputs are `arguments[FRESH]`.
        result: type of what was returned, and for each field the number of the graph's result or
            the argument that it is.
    """

    call: Callable[..., Any]
    arguments: dict[str, Any]
    run: GraphRun
    fresh: tuple[int, ...]
    result: tuple[type[ModelOutput], Mapping[str, int | str]]

    @classmethod
    def or_none(
        cls,
        call: Callable[..., Any],
        arguments: Mapping[str, Any],
        run: GraphRun | None,
        returned: Any,
    ) -> CheckedStep | None:
        """Read a step that has just run; None where a later one cannot be its repetition."""
        tokens = arguments.get(FRESH)
        if run is None or not run.is_all or type(tokens) is not Tensor:
            return None
        if not isinstance(returned, ModelOutput):
            return None
        fields: dict[str, int | str] = {}
        for name, value in returned.items():
            source = _source_or_none(value, run, arguments)
            if source is None:
                return None
            fields[name] = source
        fresh = tuple(i for i, value in enumerate(run.inputs) if value is tokens)
        return cls(call, dict(arguments), run, fresh, (type(returned), fields))

    def is_repeated_by(self, other: CheckedStep) -> bool:
        """Whether two steps differ in their tokens alone."""
        return (
            self.run.graph is other.run.graph
            and self.fresh == other.fresh
            and self.result == other.result
            and self.is_repeated_by_call(other.call, other.arguments)
            and len(self.run.inputs) == len(other.run.inputs)
            and all(
                own is its or i in self.fresh
                for i, (own, its) in enumerate(zip(self.run.inputs, other.run.inputs, strict=True))
            )
        )

    def is_repeated_by_call(self, call: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
        """Whether a call has this step's arguments, and tokens of the same form."""
        if call is not self.call or arguments.keys() != self.arguments.keys():
            return False
        for name, value in arguments.items():
            own = self.arguments[name]
            if value is not own and not (name == FRESH and _have_one_form(value, own)):
                return False
        return True


def _source_or_none(value: Any, run: GraphRun, arguments: Mapping[str, Any]) -> int | str | None:
    for number, result in enumerate(run.results):
        if value is result:
            return number
    for name, argument in arguments.items():
        if value is argument and name != FRESH:
            return name
    return None


def _have_one_form(value: Any, own: Any) -> bool:
    return (
        type(value) is Tensor
        and value.shape == own.shape
        and value.dtype == own.dtype
        and value.device == own.device
        and value.stride() == own.stride()
        and value.is_inference() == own.is_inference()
        and not value.requires_grad
    )


def _is_mesh(value: Any) -> bool:
    """Whether an input says which ranks there are, which is so for as long as they run."""
    return dist.is_available() and isinstance(value, dist.device_mesh.DeviceMesh)


class Replay:
    """Runs a checked step's graph again, with other tokens."""

    def __init__(self, step: CheckedStep, model: nn.Module, layers: list[Any]) -> None:
        """Keep where the step's graph got its inputs.

        Args:
            step: was repeated by one that was checked, too.
            model: whose forward call it is.
            layers: of the cache of keys and values.
        """
        self.step = step
        self._settings = _settings()
        self._tape: Tape | None = None
        self._was_recorded = False
        self._model = model
        self._layers, self._each = layers, list(layers)
        fresh = set(step.fresh)
        inputs = [value for i, value in enumerate(step.run.inputs) if i not in fresh]
        self._places = _Places(value for value in inputs if not _is_mesh(value))
        for argument in (step.arguments, *step.arguments.values()):
            if isinstance(argument, dict):
                self._places.search(argument)
        for layer in layers:
            self._places.search(vars(layer))
        for module in model.modules():
            self._places.search(module._parameters)
            self._places.search(module._buffers)
        self.is_whole = self._places.are_all and self._settings[-4:] == _QUIET
        self._places.add(vars(model), "forward")

    def fits(self, call: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
        """Whether Dynamo would give the graph what it was given then."""
        return (
            self.is_whole
            and self.step.is_repeated_by_call(call, arguments)
            and self._settings == _settings()
            and not self._model._forward_hooks
            and not self._model._forward_pre_hooks
            and len(self._layers) == len(self._each)
            and all(map(operator.is_, self._layers, self._each))
            and self._places.are_unchanged()
        )

    def run(self, arguments: Mapping[str, Any]) -> Any:
        """Run the graph and return what the model would."""
        results = self._results(arguments[FRESH])
        kind, fields = self.step.result
        return kind(
            **{
                name: results[source] if isinstance(source, int) else arguments[source]
                for name, source in fields.items()
            }
        )

    def _results(self, tokens: Tensor) -> Sequence[Any]:
        """What the graph returns: the first time by running it, then without Python if it can."""
        results = None if self._tape is None else self._tape.run_or_none(tokens)
        if results is not None:
            return results
        inputs = list(self.step.run.inputs)
        for place in self.step.fresh:
            inputs[place] = tokens
        is_on_cpu = tokens.device.type == "cpu"
        if not is_on_cpu:
            install_generation_tagging_init()  # as Dynamo does when it is entered
        if self._was_recorded or not is_on_cpu:
            found: Sequence[Any] = self.step.run.graph(*inputs)
            return found
        self._was_recorded = True
        found, self._tape = run_recording(self.step.run.graph, inputs, tokens)
        # The tape writes over what it returned.
        return found if self._tape is None else [result.clone() for result in found]


@functools.cache
def can_replay() -> bool:
    """Whether this version of PyTorch has what `Replay` asks."""
    try:
        return len(_settings()) > len(_QUIET)
    except AttributeError:
        return False
