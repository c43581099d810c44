"""The two ways of decoding over one set of slots, of which one is in use at a time."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from specmoe_compile.errors import SpecMoEError
from specmoe_compile.runtime.cache.eviction import Policy
from specmoe_compile.runtime.cache.statistics import LayerStats
from specmoe_compile.runtime.cuda.decode_copy import CopyDecoder
from specmoe_compile.runtime.cuda.decode_gather import GatherDecoder
from specmoe_compile.runtime.cuda.decoder import Decoder
from specmoe_compile.runtime.cuda.parts import DecoderParts
from specmoe_compile.runtime.cuda.rates import TransferRates
from specmoe_compile.runtime.cuda.supply import PinnedSupply, Supply
from specmoe_compile.system.progress import phase

logger = logging.getLogger(__name__)

TransferName = Literal["copy", "gather"]


class Decoders:
    """Holds both and switches between them.

    Attributes:
        active: the one in use.
        name: of its transfer.
        rates: what was measured to choose; None until then.
    """

    def __init__(
        self,
        gather: GatherDecoder | None,
        make_copy: Callable[[], CopyDecoder],
        *,
        measure: Callable[[], TransferRates] | None,
    ) -> None:
        """Start with `gather`, or without one with `copy`.

        Args:
            gather: None where the GPU cannot read the records itself.
            make_copy: makes the other decoder over the same slots, when it is first used.
            measure: compares the two; None where there is no link to measure.
        """
        self._gather = gather
        self._make_copy = make_copy
        self._copy: CopyDecoder | None = None
        self._measure = measure
        self._told = False
        self.rates: TransferRates | None = None
        self.active: Decoder
        if gather is None:
            self.active = self._copy = make_copy()
            self.name: TransferName = "copy"
        else:
            self.active = gather
            self.name = "gather"

    def use(
        self, transfer: Literal["auto", "copy", "gather"], *, captures: bool, fetches: bool = True
    ) -> None:
        """Switch; the slots start empty where the transfer is another one than before.

        Args:
            transfer: "auto" is the one that was measured to be faster, once per session.
            captures: steps will be captured in CUDA graphs, which only `gather` can be.
            fetches: an expert may be missing; if none is, both are as good and nothing changes.

        Raises:
            SpecMoEError: `gather` is needed and the GPU cannot read the records, or graphs that
                were captured before hold its tables.
        """
        if self._gather is None and fetches:
            if captures or transfer == "gather":
                raise SpecMoEError(
                    "Experts on disk cannot be read by the GPU itself, as transfer='gather' and the"
                    " CUDA graphs of mode='reduce-overhead' need: load the model with store='ram',"
                    " give every expert a slot (expert_cache='100%'), or use transfer='copy' and"
                    " another mode."
                )
            return
        if not captures and transfer != "copy" and not self._told:
            self._told = True
            logger.warning(
                "Decode steps on the GPU are compiled without CUDA graphs, and what the host does"
                " for each kernel is then most of a token's time: give torch.compile"
                " options={'mode': 'reduce-overhead'}, and generate cache_implementation='static'."
            )
        if self._gather is None or not fetches:
            return
        chosen: TransferName = "gather"
        if transfer != "auto":
            chosen = transfer
        elif not captures and not self._gather.captured:
            chosen = self._faster()
        if chosen == self.name:
            return
        if self._gather.captured:
            raise SpecMoEError(
                "transfer='copy' is not possible any more: CUDA graphs of this model were captured"
                " with transfer='gather' and share its slots. Load the model again."
            )
        self.active.forget()
        if chosen == "copy":
            self._copy = self._make_copy() if self._copy is None else self._copy
            self.active = self._copy
        else:
            self.active = self._gather
        self.name = chosen

    def limit_prefetch(self, limit: Tensor | None) -> None:
        """Let a device value, [1] int32, say how many records `gather` may fetch ahead."""
        if self._gather is not None:
            self._gather.limit = limit

    def copied_bytes(self) -> int:
        """What was needed so far and came by `copy`, on demand or ahead; waits for nothing."""
        return 0 if self._copy is None else self._copy.lacked_bytes()

    def stats(self) -> tuple[LayerStats, ...]:
        """Counters of each layer, of both transfers together; waits for the device."""
        first, *others = self._both()
        layers = first.stats()
        for other in others:
            for layer, more in zip(layers, other.stats(), strict=True):
                layer.add(more)
        return layers

    def reset_stats(self) -> None:
        """Set the counters to zero; the slots keep what they hold."""
        for decoder in self._both():
            decoder.reset_stats()

    def _both(self) -> list[Decoder]:
        return [decoder for decoder in (self._gather, self._copy) if decoder is not None]

    def _faster(self) -> TransferName:
        if self.rates is None:
            if self._measure is None:
                return "gather"
            with phase("trying transfers"):
                self.rates = self._measure()
            logger.info("transfer='auto' takes %s: %s", self.rates.faster, self.rates)
        return self.rates.faster


def open_decoders(
    parts: DecoderParts,
    records: Sequence[Tensor],
    supply: Supply | None,
    *,
    policy: Policy,
    measure: Callable[[], TransferRates] | None,
) -> Decoders:
    """Make the decoders of a session.

    Args:
        parts: see `Decoder`.
        records: of each layer in host memory, [E, record_bytes] uint8; page-locked on CUDA.
        supply: where records come from instead, which rules `gather` out.
        policy: which expert leaves a full cache.
        measure: see `Decoders`.
    """
    return Decoders(
        GatherDecoder(parts, records, policy=policy) if supply is None else None,
        functools.partial(CopyDecoder, parts, supply or PinnedSupply(records), policy=policy),
        measure=measure,
    )
