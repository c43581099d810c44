"""Threads and processes that share a session on a device."""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from specmoe_compile.errors import SpecMoEError
from specmoe_compile.options import SessionOptions
from tests.helpers import tiny_qwen3_moe
from tests.runtime.cuda.device_models import on_device
from tests.runtime.cuda.stream_model import StreamModel

LAYER = 1


class Step:
    """One step of a layer, op by op, in a thread of its own."""

    def __init__(self, session: Any, experts: list[int], seed: int) -> None:
        self.session = session
        self.x = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed))
        self.ids = torch.tensor([experts])
        self.weights = torch.tensor([[0.75, 0.25]])
        self._thread = ThreadPoolExecutor(1)

    def wait(self) -> None:
        self.session.wait_prefetch(0, LAYER, self.ids)

    def run(self) -> None:
        args = (self.x, self.ids, self.weights)
        self.partial = self.session.run_resident_experts(LAYER, *args, 0)

    def correct(self) -> None:
        args = (self.x, self.ids, self.weights)
        self.out = self.session.correct_experts(LAYER, self.partial, *args, 0)

    def do(self, op: str) -> None:
        self._thread.submit(getattr(self, op)).result(60)


ORDERS = sorted(set(itertools.permutations("AAABBB")))


@pytest.mark.parametrize("transfer", ["gather", "copy"])
def test_steps_of_two_threads_interleave_exactly(transfer: Any) -> None:
    """Every order in which the ops of two steps can come; the slots hold one step's experts."""
    plain = tiny_qwen3_moe(layers=2)
    with torch.no_grad():
        for order in ORDERS:
            model, session = on_device(plain, StreamModel(), slots=2)
            with session:
                session.configure(SessionOptions(transfer=transfer))
                steps = {"A": Step(session, [1, 6], 0), "B": Step(session, [3, 4], 1)}
                left = {name: iter(("wait", "run", "correct")) for name in steps}
                for name in order:
                    steps[name].do(next(left[name]))
                session.engine.forget_slots()
                for name, step in steps.items():
                    expected = plain.model.layers[LAYER].mlp.experts(step.x, step.ids, step.weights)
                    message = f"step {name} of {''.join(order)}"
                    torch.testing.assert_close(step.out, expected, msg=lambda m, w=message: w + m)
            del model


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_is_refused_at_once() -> None:
    plain = tiny_qwen3_moe(layers=2)
    model, session = on_device(plain, StreamModel(), slots=4)
    with session:
        child = os.fork()
        if child == 0:
            try:
                session.experts(LAYER, torch.zeros(1, 64), torch.tensor([[1, 6]]), torch.ones(1, 2))
            except SpecMoEError as error:
                os._exit(0 if "forked" in str(error) else 3)
            os._exit(4)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not session.closed, "the parent's goes on"
    del model
