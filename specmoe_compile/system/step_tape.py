"""Recording a step of a compiled graph, to run it again without Python (`torch_src/tape.h`).

What Inductor's code does in a decode step is the same each time: it allocates, and calls loops that
it compiled and ops of this package. Where it does nothing else, a step that is run once with these
calls noted can be repeated by a list of them, on the memory of that step: a hundred calls of Python
on objects that the experts have pushed out of the processor's caches are left out.
"""

from __future__ import annotations

import ctypes
import functools
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket, _OpNamespace, _Ops

_RECORDED = {
    "specmoe::experts": "tape_experts",
    "specmoe::products": "tape_products",
    "specmoe_kernels::attended_range": "tape_attended_range",
    "specmoe_kernels::decode_attention": "tape_decode_attention",
    "aten::topk": "tape_topk",
}
"""Ops that can be repeated, and what records them: overload `default`, no argument by name."""
_REPEATS_NOTHING = (
    "empty_strided_cpu",
    "reinterpret_tensor",
    "assert_size_stride",
    "assert_size_stride_grouped",
    "assert_tensor_metadata",
    "assert_alignment",
)
"""What allocates, and checks that hold for the memory of the recorded step."""
_WORDS = {"torch", "ops", "default", "clear", *_REPEATS_NOTHING}
_WORDS.update(part for name in _RECORDED for part in name.split("::"))
_MAX_DEPTH = 16
_MAX_ARGUMENTS = 64


class Tape:
    """A recorded step."""

    def __init__(self, number: int, results: Sequence[Tensor]) -> None:
        """Own a tape of the library.

        Args:
            number: what the ops call it by.
            results: where it puts what the graph returns.
        """
        self._number, self._results = number, list(results)
        weakref.finalize(self, torch.ops.specmoe.tape_delete.default, number).atexit = False

    def run_or_none(self, tokens: Tensor) -> list[Tensor] | None:
        """Repeat the step for other tokens; None, before anything ran, where it is another one."""
        if torch.autograd.profiler._is_profiler_enabled:
            return None
        if not torch.ops.specmoe.tape_run.default(self._number, tokens):
            return None
        return [result.clone() for result in self._results]


def run_recording(
    graph: Callable[..., Any], inputs: Sequence[Any], tokens: Tensor
) -> tuple[Any, Tape | None]:
    """Run a compiled graph; returns its results and, where it can be repeated so, its tape.

    Nobody else may run the graph meanwhile.

    Args:
        graph: what the backend returned.
        inputs: all of them.
        tokens: which of these is another one in each step.
    """
    compiled = _compiled_or_none(graph)
    if compiled is None:
        return graph(*inputs), None
    recording = _Recording(compiled.current_callable, inputs, tokens)
    compiled.current_callable = recording
    try:
        results = graph(*inputs)
    finally:
        compiled.current_callable = recording.call
    return results, recording.tape_or_none(results)


def _compiled_or_none(graph: Callable[..., Any]) -> Any:
    """The code of Inductor's that a compiled graph calls, if that is one."""
    try:
        from torch._inductor.output_code import CompiledFxGraph
    except ImportError:  # a PyTorch that has it elsewhere
        return None
    found: list[Any] = []
    seen: set[int] = set()
    waiting: list[tuple[Any, int]] = [(graph, 0)]
    while waiting:
        value, depth = waiting.pop()
        if id(value) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, CompiledFxGraph):
            found.append(value)
            continue
        waiting.extend((inner, depth + 1) for inner in _called_by(value) if callable(inner))
    return found[0] if len(found) == 1 else None


def _called_by(value: Any) -> list[Any]:
    """What a callable holds that it may call."""
    if isinstance(value, types.FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func]
    if type(value).__module__.startswith(("torch._functorch", "torch._inductor")):
        return list(getattr(value, "__dict__", {}).values())
    return []


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


class _Namespace:
    """`torch`, or a part of `torch.ops`, with calls of ops noted."""

    def __init__(self, target: Any, note: Callable[..., Any]) -> None:
        self._target, self._note = target, note

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if isinstance(value, OpOverload):
            return functools.partial(self._note, value)
        if isinstance(value, _Ops | _OpNamespace | OpOverloadPacket):
            return _Namespace(value, self._note)
        return value


class _Recording:
    """Inductor's code of one graph, with its calls noted while it runs once."""

    def __init__(self, call: Any, inputs: Sequence[Any], tokens: Tensor) -> None:
        self.call = call
        self._inputs = {id(value) for value in inputs}
        self._tokens, self._own = tokens, tokens.clone()
        self._calls: list[Callable[[int], None]] = []
        self._kept: list[Tensor] = []
        self._results: tuple[Any, ...] = ()
        self._threads = 1
        self._is_whole = _is_plain(call)

    def __call__(self, given: list[Any]) -> Any:
        """Run the code with the graph's inputs."""
        if not self._is_whole:
            return self.call(given)
        self._is_whole = all(id(value) in self._inputs for value in given)
        values = [self._own if value is self._tokens else value for value in given]
        self._kept = [value for value in values if isinstance(value, Tensor)]
        code: Any = self.call.__func__
        noted = {name: self._noted(code.__globals__.get(name)) for name in code.__code__.co_names}
        names = {**code.__globals__, **{k: v for k, v in noted.items() if v is not None}}
        given.clear()
        self._threads = torch.get_num_threads()
        results = types.FunctionType(code.__code__, names)(self.call.__self__, values)
        self._results = tuple(results)
        return results

    def _noted(self, value: Any) -> Any:
        """What stands for a global name of the code; None for itself."""
        if value is torch or isinstance(value, _Ops | _OpNamespace):
            return _Namespace(value, self._note_op)
        return functools.partial(self._note_loop, value) if _is_loop(value) else None

    def _note_loop(self, loop: Any, *arguments: Any) -> Any:
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        numbers = [v.data_ptr() if isinstance(v, Tensor) else v for v in arguments]
        if len(numbers) > _MAX_ARGUMENTS or not all(type(number) is int for number in numbers):
            self._is_whole = False
            return loop(*arguments)
        address = _address(loop.__self__.__file__)
        self._calls.append(
            lambda tape: torch.ops.specmoe.tape_loop.default(tape, address, numbers, tensors)
        )
        return loop(*arguments)

    def _note_op(self, op: OpOverload, *arguments: Any, **named: Any) -> Any:
        result = op(*arguments, **named)
        outs = [result] if isinstance(result, Tensor) else list(result)
        recorder = _RECORDED.get(op._schema.name)
        left_out = op._schema.arguments[len(arguments) :]
        is_full = not named and all(argument.has_default_value() for argument in left_out)
        if recorder is None or not is_full or op._overloadname != "default":
            self._is_whole = False
            return result
        given = (*arguments, *(argument.default_value for argument in left_out))
        note = getattr(torch.ops.specmoe, recorder).default
        self._calls.append(lambda tape: note(tape, *given, outs))
        return result

    def tape_or_none(self, results: Sequence[Any]) -> Tape | None:
        """The tape, if all that ran is on it and the graph returned what the code did."""
        own = {id(result) for result in self._results}
        inputs = {id(value) for value in self._kept}
        if not self._is_whole or len(results) != len(own) or own & inputs:
            return None
        if not all(isinstance(result, Tensor) and id(result) in own for result in results):
            return None
        number = torch.ops.specmoe.tape_new.default(self._own, self._kept, self._threads)
        tape = Tape(number, results)
        for call in self._calls:
            call(number)
        return tape


def _is_plain(call: Any) -> bool:
    """Whether code does nothing but allocate and call what can be noted, and can be repeated."""
    if not isinstance(call, types.MethodType) or not isinstance(call.__func__, types.FunctionType):
        return False
    if not hasattr(torch.ops.specmoe, "tape_new"):
        return False  # the ops could not be compiled
    code, names = call.__func__.__code__, call.__func__.__globals__
    return not code.co_freevars and all(
        name in _WORDS
        or isinstance(getattr(torch, name, None), torch.dtype)
        or _is_loop(names.get(name))
        for name in code.co_names
    )


def _is_loop(value: Any) -> bool:
    """Whether this is a loop that Inductor compiled."""
    return (
        isinstance(value, types.BuiltinFunctionType)
        and value.__name__ == "kernel"
        and isinstance(value.__self__, types.ModuleType)
        and value.__self__.__file__ is not None
    )


@functools.cache
def _address(library: str) -> int:
    kernel = ctypes.CDLL(library).kernel
    return int(ctypes.cast(kernel, ctypes.c_void_p).value or 0)
