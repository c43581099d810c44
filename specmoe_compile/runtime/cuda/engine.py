"""The engine of experts that lie in host memory or on disk and are computed on a device.

Between the calls it keeps the live step of each layer; the numbers that graphs carry from op to op
mean nothing to it.

Shape letters: T tokens, E experts, K top-k, P predicted per token, H hidden, L MoE layers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from specmoe_compile.kernels.grouped_experts.op import reduce_choices
from specmoe_compile.options import MAX_DECODE_TOKENS, SessionOptions
from specmoe_compile.predict.predictions import Predictions
from specmoe_compile.runtime.cache.eviction import DEFAULT_POLICY, Policy
from specmoe_compile.runtime.cache.slot_table import slots_per_layer
from specmoe_compile.runtime.cache.statistics import Stats
from specmoe_compile.runtime.cuda.committed import Commitments
from specmoe_compile.runtime.cuda.decoder import Decoder, DecodeStep
from specmoe_compile.runtime.cuda.decoders import open_decoders
from specmoe_compile.runtime.cuda.parts import DecoderParts
from specmoe_compile.runtime.cuda.prefetch_budget import PrefetchBudget, prefetch_pays
from specmoe_compile.runtime.cuda.prefill import PrefillBuffers
from specmoe_compile.runtime.cuda.rates import TransferRates, measure_rates
from specmoe_compile.runtime.cuda.resident import FOLLOWED, ResidentLayers
from specmoe_compile.runtime.cuda.streams import CudaStreams, Streams
from specmoe_compile.runtime.cuda.supply import StagedSupply
from specmoe_compile.runtime.cuda.vectors import DeviceVectors
from specmoe_compile.runtime.experts.module import ExpertsLayer
from specmoe_compile.runtime.policy.amount import take_part
from specmoe_compile.runtime.policy.misses import Choices, MissPolicy
from specmoe_compile.runtime.store.base import ExpertStore
from specmoe_compile.runtime.store.matching import check_store
from specmoe_compile.runtime.store.ram import all_records


class CudaEngine:
    """Runs layer steps on a device; owns slots, streams and counters there.

    Attributes:
        budget: how many records to fetch ahead.
        cache: slots and tables on the device.
        device: where experts are computed.
        default_vectors: mean outputs of the experts, learned while running.
        predictions: trained networks, for predictors that are no router.
    """

    direct_steps = None
    survives_fork = False  # nor do page locks

    def __init__(
        self,
        layers: Sequence[ExpertsLayer],
        store: ExpertStore,
        *,
        supply: StagedSupply | None = None,
        device: torch.device,
        expert_cache_bytes: int,
        cache_policy: Policy = DEFAULT_POLICY,
        top_k: int,
        streams: Streams | None = None,
        measure: Callable[[], TransferRates] | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        """Reserve device memory.

        Counters hold no times and no recall: they are not measured on the device and stay zero.

        Args:
            layers: by MoE layer ordinal; their modules say how an expert is computed.
            store: records of all of them; page-locked for a CUDA device, if in RAM.
            supply: reads a store that is not in RAM; closed by `release`.
            device: where experts are computed.
            expert_cache_bytes: bytes of slots over all layers; K spare places come on top, once.
            cache_policy: which expert leaves a full cache.
            top_k: K.
            streams: those of `device` by default.
            measure: compares the transfers for `transfer="auto"`; by default on a CUDA device only.
            release: called once on closing.

        Raises:
            ValueError: the cache holds less than one token's experts, or the store is another's.
            UnsupportedModelError: the kernels cannot compute these experts.
        """
        self.device = device
        check_store(layers, store)
        self._store = store
        self._release = release
        slots = slots_per_layer(expert_cache_bytes, store.layouts, store.num_experts, top_k)
        self._supply = supply
        self._streams = streams if streams is not None else CudaStreams(device)
        bypasses = cache_policy == "adaptive" and any(
            own < experts for own, experts in zip(slots, store.num_experts, strict=True)
        )
        parts = DecoderParts.for_layers(
            layers, slots, self._streams, device, spare=top_k if bypasses else 0
        )
        self.cache = parts.cache
        records = all_records(store) if supply is None else []
        self._prefill = PrefillBuffers(parts, records, device, supply=supply)
        self._resident = ResidentLayers(parts, top_k=top_k)
        self._resident.fill(records, supply)
        if measure is None and device.type == "cuda" and self.fetches:
            first = self._prefill.layers[0]
            measure = lambda: measure_rates(records[first], self._prefill.scratch(first))  # noqa: E731
        self._decoders = open_decoders(parts, records, supply, policy=cache_policy, measure=measure)
        self.default_vectors = DeviceVectors(
            store.num_experts,
            parts.hidden_sizes,
            device=device,
            slices=[layer.is_slice for layer in layers],
        )
        self.predictions = Predictions(len(layers))
        self._config = SessionOptions()
        self._misses = MissPolicy(self._config)
        self._commitments = Commitments(store.num_experts, self._streams, device)
        copied = self._decoders.copied_bytes
        self.budget = PrefetchBudget(store, top_k, self._streams, device, copied)
        self._learns_from_decode = False
        # The live step of each layer; False: the whole layer was computed by the prefill path.
        self._steps: list[DecodeStep | Literal[False] | None] = [None] * len(layers)
        self._waited: list[DecodeStep | None] = [None] * len(layers)
        self._owners = [0] * len(layers)  # the thread that a layer's live step is of

    def interrupt(self) -> None:
        """Do nothing: a call ends by itself, and the device has to be done before memory goes."""

    def close(self) -> None:
        """Give back page locks, slots and tables; the device has done its work."""
        if self._release is not None:
            self._release()
        # They hold views of the store, which would keep its memory mapped.
        del self._decoders, self._prefill, self._resident, self.cache, self.budget
        self._supply = None

    @property
    def fetches(self) -> bool:
        return bool(self._prefill.layers)

    @property
    def resident_layers(self) -> frozenset[int]:
        return self._resident.layers

    @property
    def foreign_ids(self) -> Mapping[int, int]:
        return self._resident.foreign_ids

    @property
    def prefetch_pays(self) -> bool:
        # Of experts on disk nothing was measured, and trials on the host leave out what is slower.
        return self._supply is not None or prefetch_pays(self.cache.slots, self._store.num_experts)

    @property
    def plans_steps(self) -> bool:
        """Whether a graph may branch on `plan_step`: where the host finds out what pays."""
        return self.budget.tries_on_host

    @property
    def multiplies(self) -> bool:
        """Whether it may, in captured steps: elsewhere launches by ops take too long."""
        return self._config.captures and self._config.products is not False

    @property
    def transfer(self) -> str:
        """How decoding fetches, "copy" or "gather"; "none" where every expert has its slot."""
        return self._decoders.name if self.fetches else "none"

    @property
    def transfer_rates(self) -> TransferRates | None:
        """What `transfer="auto"` measured; None before."""
        return self._decoders.rates

    @property
    def _decoder(self) -> Decoder:
        return self._decoders.active

    def stats(self) -> Stats:
        """Counters so far, as a copy; waits for the device."""
        staging_bytes = 0 if self._supply is None else self._supply.total_bytes
        self._resident.count()
        layers = self._decoders.stats()
        # Of experts on disk no decoder reads the counters of the device.
        self._resident.add_to(layers, counters=self._supply is not None)
        self._commitments.add_to(layers)
        return Stats(
            layers=layers,
            fast_tier_bytes=self.cache.total_bytes + self._prefill.total_bytes + staging_bytes,
            store_bytes=self._store.total_bytes,
            store=self._store.kind,
            experts=self._store.numbers,
            record_bytes=self._store.record_bytes,
            read_busy_ms=0.0 if self._supply is None else self._supply.busy_ms,
            eviction=tuple(
                FOLLOWED if layer in self.resident_layers else name
                for layer, name in enumerate(self._decoder.followed())
            ),
        )

    def configure(self, speculation: SessionOptions) -> None:
        """Set what happens to predictions, from now on.

        `auto_off` is about the number of records to fetch ahead, see `PrefetchBudget`.

        Raises:
            ValueError: predictor `previous_token`, whose memory of the step before a captured graph
                does not replay, or `cpu_math`.
            SpecMoEError: the transfer cannot be changed any more, see `Decoders.use`.
        """
        if speculation.predictor == "previous_token":
            raise ValueError(
                "predictor='previous_token' is not supported for experts on a GPU: use another"
                " predictor."
            )
        if speculation.cpu_math != "exact":
            raise ValueError(
                f"cpu_math={speculation.cpu_math!r} is for experts that are computed on the CPU,"
                " and these are computed on a GPU: leave it out."
            )
        self._decoders.use(
            speculation.transfer, captures=speculation.captures, fetches=self.fetches
        )
        self._config = speculation
        self._misses = MissPolicy(speculation)
        self._commitments.use(self._misses)
        if self.fetches:
            self.budget.use(speculation, self._decoders.name)
            self._decoders.limit_prefetch(self.budget.limit)
        self._learns_from_decode = speculation.predicts and self.fetches

    def forget_slots(self) -> None:
        """Empty the slots, between two steps; counters stay. Does not wait for the device.

        Layers with a slot for every expert keep them.
        """
        self._decoder.forget()

    def reset_stats(self) -> None:
        self._decoders.reset_stats()
        self._resident.reset_stats()
        self._commitments.reset_stats()

    def demand(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
        self._forget_step(layer)
        if layer in self.resident_layers and not self._is_prefill(layer, ids):
            return self._resident.run(layer, x, ids, weights)
        return self._demand(layer, x, ids, weights)

    def run_own(
        self, layer: int, x: Tensor, slots: Tensor, weights: Tensor, counted: Mapping[int, Tensor]
    ) -> Tensor:
        x, slots, weights = x.contiguous(), slots.contiguous(), weights.contiguous()
        self._forget_step(layer)
        return self._resident.run_own(layer, x, slots, weights, counted)

    def blend(self, layer: int, ids: Tensor, weights: Tensor, like: Tensor) -> Tensor:
        return self.default_vectors.blend(layer, ids, weights, like)

    def predict(self, layer: int, state: Tensor, width: int) -> tuple[Tensor, Tensor]:
        with self._streams.on("compute"):
            return self.predictions.predict(layer, state, width)

    def plan(self, layers: Sequence[int], edges: Sequence[int], ids: Tensor) -> list[bool]:
        predicts = self.budget.plan_step(prefill=self._is_prefill(layers[0], ids))
        wanted = {layer for layer in edges[1::2] if predicts and not self._is_exact(layer)}
        return take_part(layers, edges, wanted)

    def start(self, layer: int, ids: Tensor, weights: Tensor) -> int:
        """Start fetching predicted experts, ids and weights [T, P]; never waits on the host."""
        prefill = self._is_prefill(layer, ids)
        self.budget.begin_layer(layer, prefill=prefill)
        self._commitments.drop(layer)
        if prefill or self._is_exact(layer):
            return 0
        self._commitments.keep(layer, ids, weights)
        experts = self._store.num_experts[layer]
        with self._streams.on("compute"):
            ids = self._misses.worth_fetching_on_device(ids, weights, num_experts=experts)
        max_records = self.budget.max_records(layer)
        if max_records > 0 and self._decoder.fits(layer, ids.numel()):
            self._decoder.prefetch(layer, ids.contiguous(), max_records)
        return 0

    def settle(self, ticket: int, layer: int, ids: Tensor) -> int:
        """Plan the true ids, [T, K], and start fetching what is missing.

        With the other policies what is missing depends on the router weights, which come with
        `run`; with `commit`, where a prediction was made.
        """
        self._forget_step(layer)
        waits_for_weights = self._needs_weights(layer) or self._commitments.has(layer, ids)
        if not waits_for_weights and not self._is_prefill(layer, ids):
            self._waited[layer] = self._step(layer, ids.contiguous())
        return 0

    def run(self, number: int, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self._own_step(layer)
        return self._run(layer, x.contiguous(), ids.contiguous(), weights.contiguous())

    def correct(
        self, number: int, layer: int, partial: Tensor, x: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        self._own_step(layer)
        x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
        step, self._steps[layer] = self._steps[layer], None
        if step is None:  # the op ran twice, or without a wait
            return self._demand(layer, x, ids, weights)
        return self._correct(layer, step, partial.contiguous(), x, weights)

    def _demand(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self._commitments.drop(layer)
        if not self._is_prefill(layer, ids):
            self._waited[layer] = self._step(layer, ids)
        partial = self._run(layer, x, ids, weights)
        step, self._steps[layer] = self._steps[layer], None
        assert step is not None, "running a layer leaves a step"
        return self._correct(layer, step, partial, x, weights)

    def _run(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        step, self._waited[layer] = self._waited[layer], None
        if self._is_prefill(layer, ids):
            self._steps[layer] = False
            return self._run_prompt(layer, x, ids)
        if step is None:
            ids, weights = self._commitments.take(layer, Choices(ids, weights))
            step = self._demand_unless_weak(layer, ids, weights)._replace(weights=weights)
        self._steps[layer] = step
        y = self._decoder.run(layer, step, x, weights)
        if self._learns_from_decode and not self._streams.capturing:
            normed = self._decoder.normed(layer, y)
            self.default_vectors.learn_from_decode(layer, ids, normed, step.present)
        return y

    def _run_prompt(self, layer: int, x: Tensor, ids: Tensor) -> Tensor:
        """Unweighted outputs of many tokens, past a norm of the experts: [T, K, H]."""
        if layer in self.resident_layers:
            y = self._resident.run_prompt(layer, x, ids)
        else:
            self._decoder.join(layer)
            y = self._prefill.run(layer, x, ids)
            self._decoder.note_prompt(layer, ids)
        y = self._decoder.normed(layer, y)
        if self.fetches:
            self.default_vectors.learn(layer, ids, y)
        return y

    def _step(self, layer: int, ids: Tensor) -> DecodeStep:
        """Plan a step, with a place for each of its experts."""
        if layer in self.resident_layers:
            return self._resident.step(layer, ids)
        return self._decoder.demand(layer, ids)

    def _is_exact(self, layer: int) -> bool:
        """Whether a layer is never predicted: an option says so, or no expert can be missing."""
        return layer in self.resident_layers or self._config.skips(layer)

    def _needs_weights(self, layer: int) -> bool:
        """Whether router weights decide what is fetched."""
        return layer not in self.resident_layers and self._misses.needs_weights(layer)

    def _demand_unless_weak(self, layer: int, ids: Tensor, weights: Tensor) -> DecodeStep:
        """Plan a step; without its weak misses where weights decide."""
        threshold = self._misses.threshold
        if threshold is None or not self._needs_weights(layer):
            return self._step(layer, ids)
        return self._decoder.demand(layer, ids, weights, threshold)

    def _correct(
        self,
        layer: int,
        step: DecodeStep | Literal[False],
        partial: Tensor,
        x: Tensor,
        weights: Tensor,
    ) -> Tensor:
        if step is False:
            with self._streams.on("compute"):
                return reduce_choices(partial, weights)
        weights = weights if step.weights is None else step.weights
        vectors = self.default_vectors.tables[layer]
        return self._decoder.correct(layer, step, partial, x, weights, vectors)

    def _is_prefill(self, layer: int, ids: Tensor) -> bool:
        return ids.shape[0] > MAX_DECODE_TOKENS or not self._decoder.fits(layer, ids.numel())

    def _forget_step(self, layer: int) -> None:
        """Drop a step of this layer that was never corrected."""
        self._steps[layer] = self._waited[layer] = None
        self._owners[layer] = threading.get_ident()

    def _own_step(self, layer: int) -> None:
        """Drop a step of another thread, which came in between: both plan theirs anew."""
        if self._owners[layer] != threading.get_ident():
            self._forget_step(layer)
