"""Make compiled code reach an offloaded model whatever wraps it, one forward call at a time.

`torch.compile(module)` returns an `OptimizedModule`. Its `generate` is the inner module's bound
method, which calls the inner model and so runs eagerly without a word. The same holds for any
module around a model (PEFT's, one of your own), and for its `compile()`. PyTorch tells us of each
module that is put into another (its hook on the registration of submodules), so we know who holds
an offloaded model, and

- give an `OptimizedModule` around one a `generate` that routes every forward call of the model
  through the wrapper's compiled function;
- give each holder a `compile` that compiles the model in place as well.

Every call that goes through here takes its turn: a session and a CUDA graph hold the state of one
step, so a second thread waits until the forward call that runs has ended. A turn is one forward
call and not one `generate`: no code of the caller (a logits processor, a streamer) runs while a
turn is held, so nobody can wait for ever, and two generations with caches of their own advance in
turns, with the tokens that each would have had alone. What a forward call returns is the caller's:
the backend copies the result of a CUDA graph out of the graph's memory before the turn ends.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.modules.module import register_module_module_registration_hook

from specmoe_compile.hf.cache_names import CACHE_ARGUMENTS
from specmoe_compile.hf.gpu_memory import naming_what_did_not_fit
from specmoe_compile.hf.graph_threads import GraphState
from specmoe_compile.hf.guard_checks import GuardChecks
from specmoe_compile.hf.prompts import options_of, options_or_none, prompts_as_they_are
from specmoe_compile.hf.recompile_limit import raised_recompile_limit
from specmoe_compile.options import CompileOptions
from specmoe_compile.runtime.session import get_session

log = logging.getLogger(__name__)

Call = Callable[..., Any]


class _OwnCall(functools.partial[Any]):
    """A forward call through our backend, with nothing around it."""


class ModelCalls:
    """How the forward calls of one offloaded model run; does not keep the model alive."""

    def __init__(self, model: nn.Module) -> None:
        """Route nothing yet."""
        self._model = weakref.ref(model)
        self._mutex = threading.Lock()
        self._turn = threading.RLock()
        self._graphs = GraphState()
        self._checks = GuardChecks()
        self._routes = threading.local()  # each thread has a stack of compiled functions
        self._generating = 0
        self._in_place: Call | None = None
        self._warned = False
        self.is_compiled = False

    @property
    def model(self) -> nn.Module:
        """The offloaded model."""
        model = self._model()
        assert model is not None, "a call reached a model that is gone"
        return model

    def renew_locks(self) -> None:
        """Forget locks that threads of the parent process hold; for a forked process."""
        self._mutex, self._turn = threading.Lock(), threading.RLock()

    def run(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        """Make one forward call of the model, compiled or not, when its turn comes.

        Raises:
            SpecMoEError: the model's session is closed, or cannot run in this process; what the
                call allocates does not fit the GPU's memory.
        """
        model = self.model
        session = get_session(model.__dict__["_specmoe_session"])
        session.check_open()
        on_gpu = session.device.type == "cuda"
        if on_gpu:
            for name in CACHE_ARGUMENTS:
                _mark_static(kwargs.get(name))
        graphs = self._graphs.in_use(session.device) if on_gpu else contextlib.nullcontext()
        with self._turn, naming_what_did_not_fit(session), graphs:
            replay = self._checks.replay_or_none(call, args, kwargs)
            if replay is not None:
                return replay.run(kwargs)
            with raised_recompile_limit():
                own = model if isinstance(call, _OwnCall) else None
                return self._checks.run(call, *args, model=own, **kwargs)

    @contextlib.contextmanager
    def routed_through(self, compiled: Call) -> Iterator[None]:
        """Send this thread's calls of the model through `compiled`; other threads' as they were."""
        stack = self._stack()
        with self._mutex:
            if self._generating == 0:
                self._in_place = self.model._compiled_call_impl
                self.model._compiled_call_impl = self._dispatch
            self._generating += 1
        stack.append(compiled)
        try:
            yield
        finally:
            stack.pop()
            with self._mutex:
                self._generating -= 1
                if self._generating == 0:
                    self.model._compiled_call_impl, self._in_place = self._in_place, None

    def prompts_as_they_are(
        self, compiled: Call, plain: Call, options: CompileOptions | None
    ) -> Call:
        """A compiled call that leaves prompts to the plain one, where nothing is lost by it."""
        session = get_session(self.model.__dict__["_specmoe_session"])
        call = prompts_as_they_are(compiled, plain, options=options, session=session)
        return call if options is None else _OwnCall(call)

    def compile_call(self, call: Call, *args: Any, **kwargs: Any) -> Call:
        """`torch.compile` of a forward call that reaches the model."""
        compiled = torch.compile(call, *args, **kwargs)
        return self.prompts_as_they_are(compiled, call, options_of(kwargs.get("backend"), kwargs))

    def compile_in_place(self, *args: Any, **kwargs: Any) -> None:
        """`nn.Module.compile` of the model; arguments are those of `torch.compile`."""
        model = self.model
        # _call_impl and not __call__, which is what consults _compiled_call_impl.
        compiled = functools.partial(self.run, self.compile_call(model._call_impl, *args, **kwargs))
        with self._mutex:
            self.is_compiled = True
            if self._generating:
                self._in_place = compiled
            else:
                model._compiled_call_impl = compiled

    def warn_of_continuous_batching(self) -> None:
        """Say once that a compiled model's `generate_batch` does without the compiled graph."""
        if self.is_compiled and not self._warned:
            self._warned = True
            log.warning(
                "generate_batch (continuous batching) of %s gains nothing from the specmoe backend:"
                " it does not call torch.compile's wrapper, and after model.compile() its paged"
                " attention breaks the graph in every layer, so that no experts are fetched ahead."
                " The tokens are right, and each miss is waited for. Use generate() for the"
                " compiled graph.",
                type(self.model).__name__,
            )

    def _dispatch(self, *args: Any, **kwargs: Any) -> Any:
        stack = self._stack()
        call = stack[-1] if stack else self._in_place or self.model._call_impl
        return self.run(call, *args, **kwargs)

    def _stack(self) -> list[Call]:
        if not hasattr(self._routes, "stack"):
            self._routes.stack = []
        stack: list[Call] = self._routes.stack
        return stack


_STATIC = "_dynamo_static_input_type"
"""What Dynamo's mark is called on a tensor."""
_calls: dict[int, ModelCalls] = {}
"""By `id`: offloaded models, and modules that hold one. A module need not be hashable."""


def _remember(module: nn.Module, calls: ModelCalls) -> None:
    _calls[id(module)] = calls
    weakref.finalize(module, _calls.pop, id(module), None).atexit = False


def watch_model(model: nn.Module) -> None:
    """Let compiled code reach an offloaded model, from now on."""
    _install_hooks()
    _remember(model, ModelCalls(model))
    _give_compile(model)
    if hasattr(model, "init_continuous_batching"):
        model.init_continuous_batching = functools.partial(  # type: ignore[assignment]
            _init_continuous_batching, weakref.ref(model)
        )


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """A cache of keys and values as the keyword argument that the model's `forward` takes."""
    parameters = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    newest, oldest = CACHE_ARGUMENTS
    return {newest if newest in parameters else oldest: cache}


@functools.cache
def _install_hooks() -> None:
    """Install what watches modules and forks, once per process."""
    register_module_module_registration_hook(_on_module_registered)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_renew_locks)


def _renew_locks() -> None:
    for calls in list(_calls.values()):
        calls.renew_locks()


def _on_module_registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if torch.compiler.is_compiling():
        return  # a model that assigns a module while it runs: Dynamo traces this hook
    calls = _calls.get(id(child)) if child is not None else None
    if calls is None:
        return
    if _calls.get(id(parent)) is not calls:
        _remember(parent, calls)
    if not (isinstance(parent, OptimizedModule) and name == "_orig_mod"):
        _give_compile(parent)
        return
    calls.is_compiled = True
    # Entries of the instance, so that OptimizedModule.__getattr__ is never asked.
    parent.__dict__["_compiled_call_impl"] = functools.partial(_call, weakref.ref(parent))
    if hasattr(child, "generate"):
        parent.__dict__["generate"] = types.MethodType(_generate_compiled, parent)


def _give_compile(holder: nn.Module) -> None:
    holder.__dict__["compile"] = functools.partial(_compile, weakref.ref(holder))


def _compile(holder: weakref.ref[nn.Module], *args: Any, **kwargs: Any) -> None:
    """`nn.Module.compile` of a module that is an offloaded model, or holds one."""
    module = _alive(holder)
    calls = _calls[id(module)]
    calls.compile_in_place(*args, **kwargs)
    if module is not calls.model:
        compiled = calls.compile_call(module._call_impl, *args, **kwargs)
        module._compiled_call_impl = functools.partial(calls.run, compiled)


def _call(wrapper: weakref.ref[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """`OptimizedModule.__call__` around an offloaded model."""
    module: Any = _alive(wrapper)
    calls = _calls[id(module)]
    call = module.__dict__.get("_specmoe_call")
    if call is None:
        plain = module._orig_mod._call_impl
        options = options_or_none(module.dynamo_ctx)
        call = calls.prompts_as_they_are(module._call_impl, plain, options)
        module.__dict__["_specmoe_call"] = call
    return calls.run(call, *args, **kwargs)


def _generate_compiled(wrapper: OptimizedModule, *args: Any, **kwargs: Any) -> Any:
    """`generate` of what is wrapped, with every forward call of the offloaded model compiled."""
    calls = _calls[id(wrapper)]
    compiled = wrapper.__dict__.get("_specmoe_compiled_call")
    if compiled is None:
        plain = calls.model._call_impl
        options = options_or_none(wrapper.dynamo_ctx)
        compiled = calls.prompts_as_they_are(wrapper.dynamo_ctx(plain), plain, options)
        wrapper.__dict__["_specmoe_compiled_call"] = compiled
    with calls.routed_through(compiled):
        return wrapper._orig_mod.generate(*args, **kwargs)  # type: ignore[operator]


def _init_continuous_batching(model: weakref.ref[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """What `generate_batch` and its relatives begin with."""
    module: Any = _alive(model)
    _calls[id(module)].warn_of_continuous_batching()
    return type(module).init_continuous_batching(module, *args, **kwargs)


def _alive(reference: weakref.ref[nn.Module]) -> nn.Module:
    module = reference()
    assert module is not None, "a call reached a module that is gone"
    return module


def _mark_static(cache: Any) -> None:
    """Say that a static cache's tensors on a GPU stay where they are: CUDA graphs may write them.

    Transformers says so itself, but not while it is traced, and here prefill is compiled too.
    """
    if not getattr(cache, "is_compileable", False) or not cache.layers:
        return
    # Layers get their tensors in one call, first to last, and new ones together.
    last = list(_on_gpu(cache.layers[-1]))
    if last and all(hasattr(tensor, _STATIC) for tensor in last):
        return
    for layer in cache.layers:
        for tensor in _on_gpu(layer):
            if not hasattr(tensor, _STATIC):
                # Without a guard: another cache is recorded anew, not compiled anew.
                torch._dynamo.mark_static_address(tensor, guard=False)


def _on_gpu(layer: Any) -> Iterator[torch.Tensor]:
    """The tensors of one layer of a cache, those in its lists among them."""
    for value in vars(layer).values():
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                yield tensor
