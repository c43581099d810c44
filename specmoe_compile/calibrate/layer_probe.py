"""Run text through an offloaded model and look at every MoE layer while it runs.

The model's aten graph is rewritten by the same passes that a compiled model gets, and run node by
node: what is measured is what the lookahead router computes, not a copy of it. Every op of
`specmoe::` is answered here, so that predictions are measured for all tokens of a long window,
where a session would take the window for prefill and not predict.

Shape letters: N windows, W tokens per window, T tokens, E experts, K top-k, H hidden, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from specmoe_compile.errors import CalibrationError
from specmoe_compile.passes.find_moe_layers import find_moe_layers
from specmoe_compile.passes.fx_utils import specmoe_ops
from specmoe_compile.passes.insert_predictor import attention_input_or_none
from specmoe_compile.passes.manager import run_passes
from specmoe_compile.passes.pass_config import PassConfig
from specmoe_compile.passes.plan import SpeculationPlan
from specmoe_compile.predict.training import Recording
from specmoe_compile.runtime.cpu.experts import reduce_experts
from specmoe_compile.runtime.session import Session


@dataclass(slots=True)
class LayerMeasure:
    """What predictions of one MoE layer were worth, over all tokens seen.

    Attributes:
        tokens: tokens that were predicted; 0 for the first layer, and for one with a reason.
        needed: experts that the true router chose for them.
        recalled: those of them that were predicted.
        complete: tokens of which all experts were predicted.
        previous: the same of the prediction that the experts of the token before repeat, in every
            layer; a window's first token has none before it.
        cosine_sum: sum over tokens of the cosine of quasi-hidden and true state.
        reason: why the layer is not predicted.
    """

    tokens: int = 0
    needed: int = 0
    recalled: int = 0
    complete: int = 0
    previous: LayerMeasure | None = None
    cosine_sum: float = 0.0
    reason: str | None = None

    def add(self, predicted: Tensor, true: Tensor) -> None:
        """Count a prediction, ids [T, P], of the true experts, ids [T, K]."""
        found = (true.unsqueeze(2) == predicted.unsqueeze(1)).any(dim=2)
        self.tokens += true.shape[0]
        self.needed += found.numel()
        self.recalled += int(found.sum())
        self.complete += int(found.all(dim=1).sum())

    @property
    def recall(self) -> float | None:
        """Share of the true experts that were predicted; None without a prediction."""
        return self.recalled / self.needed if self.needed else None

    @property
    def whole(self) -> float | None:
        """Share of the tokens of which all experts were predicted; None without a prediction."""
        return self.complete / self.tokens if self.tokens else None

    @property
    def cosine(self) -> float | None:
        """Mean cosine of the quasi-hidden state with the true one; None without a prediction."""
        return self.cosine_sum / self.tokens if self.tokens else None


class LayerProbe:
    """Measures an offloaded model's layers; what it saw accumulates until `reset`.

    Attributes:
        vectors: default vectors to predict with, [E, H] float32 of each layer, on the session's
            device; zero at first.
        sums: sum of each expert's outputs, [E, H] float32 of each layer.
        counts: samples in `sums`, [E] int64 of each layer.
        layers: per MoE layer, what its predictions were worth.
        recording: takes in what trained predictors read, and what the routers chose; None: nobody.
    """

    def __init__(self, model: nn.Module, session: Session) -> None:
        """Prepare; nothing runs yet.

        Args:
            model: offloaded Hugging Face model.
            session: the model's.
        """
        self.session = session
        shapes = [tuple(table.shape) for table in session.default_vectors.tables]
        with session.device:
            self.vectors = [torch.zeros(shape) for shape in shapes]
            self.sums = [torch.zeros(shape) for shape in shapes]
            self.counts = [torch.zeros(shape[0], dtype=torch.int64) for shape in shapes]
        self.layers = [LayerMeasure() for _ in shapes]
        self.learns = True
        self.recording: Recording | None = None
        self._window = torch.Size((1, 1))
        self._predicted: dict[int, Tensor] = {}
        self._quasi: dict[int, Tensor] = {}
        # The head, which may be most of a small model's arithmetic, says nothing about layers.
        inner = getattr(model, "base_model", model)
        self._run: Callable[..., Any] = torch.compile(inner, backend=self._backend)

    def reset(self) -> None:
        """Forget what predictions were worth; sums, counts and vectors stay."""
        self.layers = [LayerMeasure(reason=layer.reason) for layer in self.layers]

    def means(self) -> list[Tensor]:
        """Mean output of each expert so far, [E, H] float32 of each layer; zero without samples."""
        return [
            total / count.clamp(min=1).unsqueeze(1)
            for total, count in zip(self.sums, self.counts, strict=True)
        ]

    @torch.no_grad()
    def run(self, window: Tensor) -> None:
        """Run one batch of windows, [B, W] int64 token ids on any device."""
        self._window = window.shape
        if self.recording is not None:
            self.recording.begin(window.numel())
        self._run(input_ids=window.to(self.session.device), use_cache=False)

    def _backend(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=self._compile)(gm, list(example_inputs))

    def _compile(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._functorch._aot_autograd.utils import make_boxed_func

        plan = SpeculationPlan()
        attends = _attention_inputs(gm)
        report = run_passes(gm, PassConfig(), plan=plan)
        if not plan.layers:
            raise CalibrationError(
                f"this model cannot be calibrated: {report.reason or 'its graph is not understood'}"
            )
        for index, reason in report.skipped.items():
            self.layers[index].reason = reason
        gm.recompile()
        interpreter = _ProbeInterpreter(gm, self, plan, attends)
        return make_boxed_func(partial(interpreter.run, enable_io_processing=False))

    def experts(self, x: Tensor, ids: Tensor, weights: Tensor, layer: int) -> Tensor:
        """Run a layer, [T, H], [T, K], [T, K] -> [T, H], and add up its experts' outputs."""
        tokens, top_k = ids.shape
        if self.recording is not None:
            self.recording.add_choice(layer, ids, weights)
        measure = self.layers[layer]
        measure.previous = measure.previous or LayerMeasure()
        by_window = ids.view(*self._window, -1)
        measure.previous.add(by_window[:, :-1].flatten(0, 1), by_window[:, 1:].flatten(0, 1))
        # One expert per row: the outputs come back one by one, not summed over K.
        rows = x.repeat_interleave(top_k, dim=0)
        y = self.session.experts(
            layer, rows, ids.reshape(-1, 1), weights.new_ones(tokens * top_k, 1)
        )
        if self.learns:
            flat = ids.reshape(-1).long()
            self.sums[layer].index_add_(0, flat, y.float())
            self.counts[layer].index_add_(0, flat, torch.ones_like(flat))
        return reduce_experts(y.view(tokens, top_k, -1), weights, x)

    def blend(self, ids: Tensor, weights: Tensor, like: Tensor, layer: int) -> Tensor:
        """Blend `vectors`: [T, K], [T, K] -> [T, H] in the dtype of `like`."""
        table = self.vectors[layer]
        dense = table.new_zeros(ids.shape[0], table.shape[0])
        dense.scatter_add_(1, ids.long(), weights.float())
        return (dense @ table).to(like.dtype)

    def predict(self, ids: Tensor, weights: Tensor, layer: int) -> None:
        """Take a prediction, ids and weights [T, P]."""
        self._predicted[layer] = ids

    def meet(self, ids: Tensor, layer: int) -> None:
        """Compare a layer's prediction with its true experts, [T, K]."""
        predicted = self._predicted.pop(layer, None)
        if predicted is None:
            return
        self.layers[layer].add(predicted, ids)

    def compare(self, quasi: Tensor, true: Tensor, layer: int) -> None:
        """Compare a quasi-hidden state with the state it stands for, both [.., H]."""
        if self.recording is not None:
            self.recording.add_state("estimator", layer, quasi)
        cosine = nn.functional.cosine_similarity(quasi.float(), true.float(), dim=-1)
        self.layers[layer].cosine_sum += float(cosine.sum())


class _ProbeInterpreter(Interpreter):
    """Runs a rewritten graph node by node and hands what matters to the probe."""

    def __init__(
        self, gm: GraphModule, probe: LayerProbe, plan: SpeculationPlan, attends: dict[Node, int]
    ) -> None:
        super().__init__(gm)
        self._probe = probe
        self._attends = attends
        self._quasi_of: dict[Node, int] = {}
        self._true_of: dict[Node, int] = {}
        self._quasi: dict[int, Tensor] = {}
        for source, *_, target in (path for path in plan.paths if len(path) > 1):
            if source.quasi is not None and target.residual is not None:
                self._quasi_of[source.quasi] = target.index
                self._true_of[target.residual] = target.index

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        if n in self._quasi_of:
            self._quasi[self._quasi_of[n]] = result
        if n in self._true_of:
            layer = self._true_of[n]
            self._probe.compare(self._quasi.pop(layer), result, layer)
        if n in self._attends and self._probe.recording is not None:
            self._probe.recording.add_state("pre_attention", self._attends[n], result)
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer the ops of `specmoe`; run any other."""
        ops, probe = specmoe_ops(), self._probe
        if target is ops.experts.default:
            x, ids, weights, _, layer = args
            return probe.experts(x, ids, weights, layer)
        if target is ops.blend_default_vectors.default:
            ids, weights, like, _, layer = args
            return probe.blend(ids, weights, like, layer)
        if target is ops.start_prefetch.default:
            probe.predict(args[0], args[1], args[3])
            return torch.zeros(1, dtype=torch.int64)
        if target is ops.wait_prefetch.default:
            probe.meet(args[1], args[3])
            return torch.zeros(1, dtype=torch.int64)
        if target is ops.run_resident_experts.default:
            return args[0]
        if target is ops.correct_experts.default:
            _, x, ids, weights, _, _, layer = args
            return probe.experts(x, ids, weights, layer)
        return super().call_function(target, args, kwargs)


def _attention_inputs(gm: GraphModule) -> dict[Node, int]:
    """The states that attentions read, and the MoE layers that these belong to."""
    config, plan = PassConfig(predictor="pre_attention"), SpeculationPlan()
    find_moe_layers(gm.graph, config, plan)
    found = {attention_input_or_none(layer): layer.index for layer in plan.layers}
    return {node: index for node, index in found.items() if node is not None}
