"""The structures of `src/weight.h` and `src/experts.h`, field by field, for ctypes.

Shape letters: N outputs, K inputs, H hidden, I expert intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p

import torch

DTYPES: Mapping[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BOOKS: Mapping[str, int] = {"e2m1": 3, "int4": 4, "nf4": 5, "e4m3": 6, "int8": 7}
SCALES: Mapping[str, int] = {"e8m0": 1, "e4m3": 2, "f32": 3, "bf16": 4, "f16": 5}
ACTIVATIONS: Mapping[str, int] = {
    "silu": 0,
    "gelu": 1,
    "gelu_tanh": 2,
    "relu": 3,
    "relu2": 4,
    "swiglu_oai": 5,
}
ABSENT = -1
"""Offset of a plane that a weight does not have."""


class WeightSpec(Structure):
    """One weight [N, K] in a record; offsets in bytes, `ABSENT` for a plane that is not there."""

    _fields_ = (
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("row_bytes", c_int64),
        ("block_rows", c_int64),
        ("block_columns", c_int64),
        ("scale_columns", c_int64),
        ("codes", c_int64),
        ("scales", c_int64),
        ("zeros", c_int64),
        ("globals", c_int64),
        ("bias", c_int64),
        ("book", c_int32),
        ("scale", c_int32),
        ("bias_dtype", c_int32),
        ("unused", c_int32),
    )


class GateSpec(Structure):
    """Activation and gate; every step is rounded to the dtype."""

    _fields_ = (
        ("activation", c_int32),
        ("dtype", c_int32),
        ("has_gate", c_int32),
        ("limit_after", c_int32),
        ("alpha", c_float),
        ("limit", c_float),
    )


class ExpertSpec(Structure):
    """How the experts of a layer are computed."""

    _fields_ = (
        ("up", WeightSpec),
        ("down", WeightSpec),
        ("gate", GateSpec),
        ("interleaved", c_int32),
        ("int8", c_int32),
    )


class ExpertTask(Structure):
    """One expert of a step: address of its record, its tokens, and where their outputs go."""

    _fields_ = (
        ("record", c_void_p),
        ("tokens", POINTER(c_int32)),
        ("places", POINTER(c_int32)),
        ("count", c_int64),
    )


class CacheTables(Structure):
    """One layer's slots, see `runtime.cache`: E experts, S slots, D decays."""

    _fields_ = (
        ("experts", c_int64),
        ("slots", c_int64),
        ("slot_of", c_void_p),
        ("expert_of", c_void_p),
        ("last_use", c_void_p),
        ("clock", c_void_p),
        ("scores", c_void_p),
        ("regret", c_void_p),
        ("policy", c_int32),
        ("spare", c_int32),
    )


class StepLayer(Structure):
    """What a layer's steps need; addresses of Python's memory."""

    _fields_ = (
        ("expert", POINTER(ExpertSpec)),
        ("cache", CacheTables),
        ("memory", c_void_p),
        ("record_bytes", c_int64),
        ("file_offset", c_int64),
        ("verified", c_void_p),
        ("unused", c_void_p),
        ("pushed_out", c_void_p),
        ("counters", c_void_p),
        ("flags", c_void_p),
        ("vectors", c_void_p),
        ("samples", c_void_p),
        ("is_slice", c_int64),
    )


class StepControl(Structure):
    """What Python says between steps."""

    _fields_ = (
        ("is_off", c_int64),
        ("guesses", c_int64),
        ("is_judged", c_int64),
        ("budget_bytes", c_int64),
        ("width", c_int64),
        ("learns", c_int64),
        ("learning_turn", c_int64),
        ("max_samples", c_int64),
        ("is_frozen", c_void_p),
        ("threshold", c_double),
    )


class StepCall(Structure):
    """Arguments of an op; filled in by it."""

    _fields_ = (
        ("x", c_void_p),
        ("ids", c_void_p),
        ("weights", c_void_p),
        ("out", c_void_p),
        ("tokens", c_int64),
        ("top_k", c_int64),
        ("hidden", c_int64),
        ("x_dtype", c_int32),
        ("weights_dtype", c_int32),
        ("id_bytes", c_int32),
        ("unused", c_int32),
    )


class SpareRoom(Structure):
    """Places besides the slots, see `runtime.cache.spare_places`: P places."""

    _fields_ = (
        ("places", c_int64),
        ("stride_bytes", c_int64),
        ("memory", c_void_p),
        ("layer_of", c_void_p),
        ("expert_of", c_void_p),
        ("last_use", c_void_p),
        ("is_busy", c_void_p),
        ("clock", c_void_p),
    )


class AttentionCall(Structure):
    """Arguments of `decode_attention`; filled in by it."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "mask", "sinks", "bounds", "out")),
        *((f"{name}_strides", c_int64 * 3) for name in ("q", "k", "v", "mask")),
        ("sequences", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("queries", c_int64),
        ("head", c_int64),
        ("bound_rows", c_int64),
        ("dtype", c_int32),
        ("mask_dtype", c_int32),
        ("sinks_dtype", c_int32),
        ("scale", c_float),
    )


STRUCTURES = (
    WeightSpec,
    GateSpec,
    ExpertSpec,
    ExpertTask,
    CacheTables,
    StepLayer,
    StepControl,
    StepCall,
    SpareRoom,
    AttentionCall,
)
