"""A session whose experts the C++ engine computes: the same numbers whatever the cache holds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from specmoe_compile.options import SessionOptions
from specmoe_compile.runtime.cpu.native import build, layer, library
from specmoe_compile.runtime.experts.formats.expert_format import ExpertFormat
from tests.runtime.cpu.test_native_kernels import Experts
from tests.runtime.experts.test_weight_code import MXFP4, NF4
from tests.runtime.fakes import L, reference, token_batch
from tests.runtime.split_path import predict, step
from tests.runtime.test_session import CACHES, MODULES, make_session, poison


@pytest.mark.usefixtures("tiny_experts")
@pytest.mark.parametrize("cache", [name for name in CACHES if name != "in_place"])
def test_caches_and_predictions_change_no_bit(cache: str) -> None:
    generator = random.Random(cache)
    with make_session(cache) as session, make_session("in_place") as plain:
        assert all(runner.native is not None for runner in session.engine._runners)
        session.configure(SessionOptions(auto_off=False))
        poison(session)
        for seed in range(40):
            number = seed % L
            batch = token_batch(seed, generator.choice([1, 1, 2, 5, 16, 20]))
            expected = plain.experts(number, *batch)
            close = reference(MODULES[number], *batch)
            torch.testing.assert_close(expected, close, rtol=1e-5, atol=1e-5)
            if generator.random() < 0.5:
                assert torch.equal(session.experts(number, *batch), expected)
                continue
            ticket = session.start_prefetch(number, *predict("random", batch, generator))
            assert torch.equal(step(session, number, batch, ticket), expected)


@pytest.mark.usefixtures("tiny_experts")
def test_int8_arithmetic_is_refused_where_there_is_none_and_undone_by_exact() -> None:
    with make_session("half") as session, pytest.raises(ValueError, match="quantize='int4'"):
        session.configure(SessionOptions(cpu_math="int8"))
    tool = layer.engine_or_none()
    assert tool is not None
    experts = Experts(64, 96, ExpertFormat(up=MXFP4, down=NF4), torch.float32)
    native = layer.NativeLayer(tool, experts.spec())
    x, y = torch.randn(1, 64), torch.empty(3, 1, 64)
    task = layer.Task(experts.records[0].data_ptr(), (0,), (0,))
    for out, kind in zip(y, ("exact", "int8", "exact"), strict=True):
        layer.use_cpu_math(kind, [None, native])
        native.run([task], x, out)
    tool.settle()  # before the records go
    assert torch.equal(y[0], y[2])
    error = (y[1] - y[0]).norm() / y[0].norm()
    assert 1e-5 < error < 0.02


@pytest.mark.parametrize("lacks", ["no C++ compiler", "1.0 GiB of RAM, and 500.0 MiB are free"])
def test_without_a_compiler_or_memory_for_it_torch_computes_and_says_so_once(
    lacks: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if lacks == "no C++ compiler":
        monkeypatch.setattr(build, "_which", lambda name: None)
    else:
        monkeypatch.setattr(build, "_which", lambda name: "/bin/false")
        monkeypatch.setattr(library, "available_ram_bytes", lambda: 500 << 20)
    monkeypatch.setattr(library, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(layer, "MIN_RECORD_BYTES", 0)
    library._library_or_none.cache_clear()
    try:
        for _ in range(2):
            with make_session("half") as session:
                batch = token_batch(0, 3)
                got = session.experts(0, *batch)
                assert torch.equal(got, reference(MODULES[0], *batch))
    finally:
        library._library_or_none.cache_clear()
    said = [record.getMessage() for record in caplog.records if "C++" in record.getMessage()]
    assert len(said) == 1, said
    assert lacks in said[0]
    assert not any(tmp_path.rglob("*.so"))


def test_a_compiler_that_fails_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "_FLAGS", ("--no-such-flag",))
    with pytest.raises(build.BuildError, match="no-such-flag"):
        build.build(tmp_path / "folder" / "library.so")
    assert list((tmp_path / "folder").iterdir()) == []
