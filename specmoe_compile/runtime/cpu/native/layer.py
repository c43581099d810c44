"""One layer's experts as the C++ engine computes them: a description once, then one call per step.

Shape letters: T tokens, K top-k, N tokens of one expert, H hidden, I expert intermediate.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from ctypes import CDLL, c_int32
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from specmoe_compile.errors import SpecMoEError, UnsupportedModelError
from specmoe_compile.runtime.cpu.native.library import library_or_none, usable_cores
from specmoe_compile.runtime.cpu.native.structures import (
    ABSENT,
    ACTIVATIONS,
    BOOKS,
    DTYPES,
    SCALES,
    ExpertSpec,
    ExpertTask,
    GateSpec,
    WeightSpec,
)
from specmoe_compile.runtime.experts.form import recognise_form
from specmoe_compile.runtime.experts.formats.weight_code import WeightCode
from specmoe_compile.runtime.experts.layout import ExpertLayout, TensorSpec

log = logging.getLogger(__name__)

MIN_RECORD_BYTES = 256 << 10
"""Smaller experts fit the caches and are computed by `torch.mm`, whose sums run in the order of
transformers' own."""
_MAX_INPUTS = 4096 * 32
_FOUR_BIT = ("e2m1", "int4", "nf4")
_INT8_BOOKS = {BOOKS[name] for name in ("e2m1", "int4", "int8")}

_engine_lock = threading.Lock()
_engine: NativeEngine | None = None


class Task(NamedTuple):
    """One expert of a step: address of its record, its tokens, and their rows of the output."""

    record: int
    tokens: Sequence[int]
    places: Sequence[int]


class NativeEngine:
    """Threads and kernels of the library; a process needs one, and tests make more.

    Attributes:
        library: the functions of `src/api.cpp`.
        pointer: the engine, for them.
    """

    def __init__(self, library: CDLL, threads: int, kernels: str | None = None) -> None:
        """Start nothing yet: the threads come with the first step.

        Args:
            library: from `library_or_none`.
            threads: the caller counts as one.
            kernels: "portable", "avx2", "avx512" or "avx512_bf16"; None for the best that the
                processor has.

        Raises:
            SpecMoEError: this processor does not have these kernels.
        """
        self.library = library
        self.pointer = library.specmoe_engine_new(threads, kernels and kernels.encode())
        if not self.pointer:
            raise SpecMoEError(f"This processor has no {kernels} kernels: leave them out.")
        self._finalizer = weakref.finalize(self, library.specmoe_engine_delete, self.pointer)
        # As the process ends another thread may still be in a step; its memory goes with it.
        self._finalizer.atexit = False

    @property
    def kernels(self) -> str:
        """Name of the instruction set in use."""
        name: bytes = self.library.specmoe_engine_kernels(self.pointer)
        return name.decode()

    def set_threads(self, threads: int) -> None:
        """Compute with so many threads from now on, the caller being one."""
        self.library.specmoe_engine_set_threads(self.pointer, threads)

    def settle(self) -> None:
        """See the function of this name."""
        self.library.specmoe_engine_settle(self.pointer)

    def run(self, spec: ExpertSpec, tasks: Sequence[Task], x: Tensor, y: Tensor) -> None:
        """Compute experts into rows of `y`, unweighted.

        Args:
            spec: how.
            tasks: which.
            x: [T, H] float32, contiguous.
            y: [T*K, H] float32, contiguous.

        Raises:
            MemoryError: no memory or no thread was left.
        """
        count = len(tasks)
        array = (ExpertTask * count)()
        for entry, (record, tokens, places) in zip(array, tasks, strict=True):
            n = len(tokens)
            entry.record, entry.count = record, n
            entry.tokens, entry.places = (c_int32 * n)(*tokens), (c_int32 * n)(*places)
        failed = self.library.specmoe_engine_run(
            self.pointer, spec, array, count, x.data_ptr(), x.shape[0], y.data_ptr()
        )
        if failed:
            raise MemoryError("the C++ engine got no memory or no thread")


def engine_or_none() -> NativeEngine | None:
    """Return the process's engine, with as many threads as torch has now, or None."""
    global _engine
    library = library_or_none()
    if library is None:
        return None
    threads = max(1, min(torch.get_num_threads(), usable_cores()))
    with _engine_lock:
        if _engine is None:
            _engine = NativeEngine(library, threads)
            log.info("C++ engine: %s kernels, %d threads", _engine.kernels, threads)
        else:
            _engine.set_threads(threads)
        return _engine


def use_cpu_math(kind: str, layers: Sequence[NativeLayer | None]) -> None:
    """Choose the arithmetic of a session's layers; those whose codes are no integers stay exact.

    Args:
        kind: "exact" or "int8".
        layers: of the session; None for those that torch computes.

    Raises:
        ValueError: "int8" where no layer has it.
    """
    ready = [layer for layer in layers if layer is not None and layer.has_int8]
    if kind == "int8" and not ready:
        raise ValueError(
            f"cpu_math={kind!r} needs experts with e2m1, int4 or int8 codes and the C++ engine, and"
            " no layer of this model has both: leave it out, or load the model with"
            " quantize='int4'."
        )
    for layer in ready:
        layer.use_int8(kind == "int8")


def settle() -> None:
    """Wait until no late thread reads a record any more; call it before records go away."""
    if _engine is not None:
        _engine.settle()


class NativeLayer:
    """Runs one layer's experts from their records.

    Attributes:
        spec: how they are computed.
    """

    def __init__(self, engine: NativeEngine, spec: ExpertSpec) -> None:
        self._engine = engine
        self.spec = spec
        self._codes_offset: int = spec.up.codes

    @property
    def has_int8(self) -> bool:
        """Whether a weight's codes are integers, which int8 activations may be multiplied with."""
        return bool({self.spec.up.book, self.spec.down.book} & _INT8_BOOKS)

    def use_int8(self, on: bool) -> None:
        """Multiply integer codes with activations of 8 bits from now on, or with float32."""
        self.spec.int8 = on

    def record_of(self, codes: Tensor) -> int:
        """Address of the record whose up projection's codes these are."""
        return codes.data_ptr() - self._codes_offset

    def run(self, tasks: Sequence[Task], x: Tensor, y: Tensor) -> None:
        """Compute experts into rows of `y`, [T*K, H]; `x` [T, H] in the experts' dtype."""
        inputs = x.float().contiguous()
        if y.dtype == torch.float32:
            self._engine.run(self.spec, tasks, inputs, y)
            return
        out = y.new_empty(y.shape, dtype=torch.float32)
        self._engine.run(self.spec, tasks, inputs, out)
        places = [place for task in tasks for place in task.places]
        y[places] = out[places].to(y.dtype)


def native_layer_or_none(
    module: nn.Module, layout: ExpertLayout, dtype: torch.dtype
) -> NativeLayer | None:
    """Return the layer as the C++ engine runs it; None where torch has to.

    Args:
        module: the experts module; says the gate.
        layout: of its records.
        dtype: what is computed in.
    """
    if layout.record_bytes < MIN_RECORD_BYTES:
        return None
    spec = expert_spec_or_reason(module, layout, dtype)
    if isinstance(spec, str):
        log.info("experts of %s are computed by torch: %s", type(module).__name__, spec)
        return None
    engine = engine_or_none()
    return None if engine is None else NativeLayer(engine, spec)


def expert_spec_or_reason(
    module: nn.Module, layout: ExpertLayout, dtype: torch.dtype
) -> ExpertSpec | str:
    """Describe a layer's experts, or say what about them the kernels do not have."""
    owner: Any = module
    if dtype not in DTYPES:
        return f"they compute in {dtype}"
    if getattr(owner, "has_post_expert_norm", False):
        return "each output is normalised"
    if owner.is_transposed and layout.format.is_plain:
        return "their weights are transposed"
    try:
        form = recognise_form(module)
    except UnsupportedModelError as error:
        return str(error)
    tensors = {spec.name: spec for spec in layout.tensors}
    up_name = "gate_up_proj" if form.has_gate else "up_proj"
    up = _weight_or_reason(tensors, up_name, layout.format.up)
    down = _weight_or_reason(tensors, "down_proj", layout.format.down)
    for weight in (up, down):
        if isinstance(weight, str):
            return weight
    gate = GateSpec(
        ACTIVATIONS[form.activation],
        DTYPES[dtype],
        form.has_gate,
        form.limit_after,
        form.alpha,
        form.limit,
    )
    return ExpertSpec(up, down, gate, form.interleaved, 0)


def _weight_or_reason(
    tensors: dict[str, TensorSpec], name: str, code: WeightCode
) -> WeightSpec | str:
    codes = tensors[name]
    outputs, row = codes.shape
    inputs = row * 2 if code.book in _FOUR_BIT else row
    if inputs > _MAX_INPUTS:
        return f"{name} has {inputs} inputs, the kernels take {_MAX_INPUTS}"
    bias = tensors.get(f"{name}_bias")
    if bias is not None and bias.dtype not in DTYPES:
        return f"{name}_bias is {bias.dtype}"
    spec = WeightSpec(
        outputs=outputs,
        inputs=inputs,
        row_bytes=row * codes.dtype.itemsize,
        block_rows=1,
        block_columns=inputs,
        scale_columns=1,
        codes=codes.offset_bytes,
        scales=ABSENT,
        zeros=ABSENT,
        globals=ABSENT,
        bias=ABSENT if bias is None else bias.offset_bytes,
        bias_dtype=0 if bias is None else DTYPES[bias.dtype],
    )
    if code.scale is None:
        if codes.dtype not in DTYPES:
            return f"{name} is {codes.dtype}"
        spec.book, spec.scale = DTYPES[codes.dtype], 0
        return spec
    rows, columns = code.block[0] or outputs, code.block[1] or inputs
    if columns < inputs and columns % 32 and not (columns == 16 and code.book in _FOUR_BIT):
        return f"{columns} inputs of {name} share a scale, and not a multiple of 32"
    spec.book, spec.scale = BOOKS[code.book], SCALES[code.scale]
    spec.block_rows = rows
    spec.scale_columns = code.scale_shape(outputs, inputs)[1]
    spec.block_columns = columns if columns < inputs else -(-inputs // 32) * 32
    spec.scales = tensors[f"{name}_scales"].offset_bytes
    if code.has_zero:
        spec.zeros = tensors[f"{name}_zeros"].offset_bytes
    if code.has_global:
        spec.globals = tensors[f"{name}_global"].offset_bytes
    return spec
