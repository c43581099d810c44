"""Errors that specmoe raises.

A message says what is wrong, what was got, what was expected and what to do. Callers' mistakes are
`ValueError` or `TypeError`; everything that fails while compiling, storing or transferring is a
`SpecMoEError`.
"""

from __future__ import annotations


class SpecMoEError(RuntimeError):
    """Base class of the errors that specmoe raises for reasons other than a wrong argument."""


class UnsupportedModelError(SpecMoEError):
    """The model has no Mixture-of-Experts layer that specmoe can offload, or spans several GPUs."""


class CheckpointError(SpecMoEError):
    """A checkpoint folder is missing, has no weights, or has a missing or truncated shard."""


class StoreError(SpecMoEError):
    """An expert store cannot be written, or does not match its header, checksums or model."""


class TransferError(SpecMoEError):
    """An expert could not be brought into the fast tier (reader failed, session closed)."""


class CompileError(SpecMoEError):
    """The graph could not be rewritten or lowered, and `strict=True` forbids the fallback."""


class InvariantError(CompileError):
    """A rewritten graph breaks one of the invariants that every pass must keep."""


class CalibrationError(SpecMoEError):
    """A calibration artefact is missing, malformed, or belongs to another model."""


class TraceError(SpecMoEError):
    """A routing trace is missing, malformed, of another version, or of another model."""
