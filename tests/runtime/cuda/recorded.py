"""Generation through rewritten graphs whose ops a `StreamModel` records, the graph's own too.

Memory that the graph gets anew may be memory that a transfer still reads or writes; so its ops
count as well, on the stream that computes. Sessions take turns on one model, compiled once: tests
that share a recorder must not reset Dynamo in between.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from specmoe_compile import backend
from specmoe_compile.hf.attach import attach_session
from specmoe_compile.options import SessionOptions
from specmoe_compile.passes.fx_utils import find_calls, specmoe_ops
from specmoe_compile.passes.manager import SpeculationPass
from specmoe_compile.runtime.session import Session
from tests.helpers import greedy, prompts
from tests.runtime.cuda.device_models import open_session
from tests.runtime.cuda.stream_model import StreamModel


class Prompt(NamedTuple):
    """What is generated.

    Attributes:
        batch, length, new_tokens: numbers of rows, of tokens in each prompt and of new tokens.
        static: whether the cache of keys and values is.
    """

    batch: int = 1
    length: int = 5
    new_tokens: int = 6
    static: bool = False

    def generate(self, model: Any) -> torch.Tensor:
        """Token ids, prompts included."""
        kwargs = {"cache_implementation": "static"} if self.static else {}
        ids = prompts(self.batch, self.length)
        return greedy(model, ids, self.new_tokens, **kwargs)  # type: ignore[no-any-return]


class Recorder:
    """A model that is compiled by and by, and runs on the streams of the session that is open."""

    def __init__(self, plain: Any, **options: Any) -> None:
        self.prefetches = 0
        """`start_prefetch` nodes of the rewritten graphs so far, outside branches."""
        self.blends = self.waits = 0
        """The other nodes that only predicted layers have, `blend_default_vectors` and waits."""
        self.branches = 0
        """Layers of theirs that stand in branches."""
        self.graphs = 0
        self.streams = StreamModel()
        self._plain = plain
        self._model = copy.deepcopy(plain)
        lower = backend._lower_eager

        def recorded(gm: Any, inputs: Any, speculation: SpeculationPass) -> Any:
            def counted(graph: Any) -> None:
                speculation(graph)
                self.graphs += 1
                ops = specmoe_ops()
                self.prefetches += len(list(find_calls(graph, ops.start_prefetch.default)))
                self.blends += len(list(find_calls(graph, ops.blend_default_vectors.default)))
                self.waits += len(list(find_calls(graph, ops.wait_prefetch.default)))
                self.branches += len(list(find_calls(graph, torch.ops.higher_order.cond)))

            compiled = lower(gm, inputs, counted)

            def call(*arguments: Any) -> Any:
                with self.streams.on("compute"):
                    return compiled(*arguments)

            return call

        self._lower = recorded
        self._options = {"lowering": "eager", "prefetch": True, **options}
        self._compiled: Any = None

    @contextmanager
    def session(
        self,
        streams: StreamModel,
        *,
        slots: int = 4,
        config: SessionOptions | None = None,
        **kwargs: Any,
    ) -> Iterator[Session]:
        """Give the model a new session; it runs on its streams until the end."""
        self.streams = streams
        with (
            mock.patch.object(backend, "_lower_eager", self._lower),
            open_session(self._plain, self._model, streams, slots=slots, **kwargs) as opened,
        ):
            attach_session(self._model, opened)
            if self._compiled is None:  # a wrapper learns from the session to generate compiled
                self._compiled = torch.compile(
                    self._model, backend="specmoe", options=self._options
                )
            # Compiling sets the options of the compile; what is compiled already keeps these.
            self._config = config
            yield opened

    def run(self, prompt: Prompt, session: Session) -> torch.Tensor:
        """Generate, and let the streams run dry.

        Graphs are compiled first, since that configures the session.
        """
        if self._config is not None:
            config, self._config = self._config, None
            graphs = -1
            while graphs != self.graphs:
                graphs = self.graphs
                prompt.generate(self._compiled)
            session.configure(config)
            session.reset_stats()
            self.streams.restart()
        tokens = prompt.generate(self._compiled)
        self.streams.finish()
        return tokens
