"""Forms of experts against the experts modules of transformers themselves."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specmoe_compile.errors import UnsupportedModelError
from specmoe_compile.kernels.expert_mlp.op import run_experts_decode, run_resident_experts
from specmoe_compile.kernels.grouped_experts.op import reduce_choices, run_grouped_experts_
from specmoe_compile.runtime.experts.form import ExpertBank, ExpertForm, recognise_form

EXPERTS, HIDDEN, INNER, TOP_K = 5, 24, 12, 3
_CONFIG: dict[str, Any] = {
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "hidden_size": HIDDEN,
    "moe_hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "moe_latent_size": None,
    "hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "hidden_activation": "gelu_pytorch_tanh",
    "swiglu_limit": 0.6,
    "swiglu_alpha": 1.702,
    "post_norm_eps": 1e-6,
    "mlp_gate_softcap": 4.0,
    "mlp_up_softcap": 25.0,
    "_experts_implementation": "batched_mm",
}


def make_module(family: str, name: str, *args: Any, **config: Any) -> Any:
    """A tiny experts module with random weights."""
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    module: nn.Module = getattr(modeling, name)(SimpleNamespace(**(_CONFIG | config)), *args)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
    return module.requires_grad_(False)


def bank_of(module: Any) -> ExpertBank:
    return ExpertBank.from_views(dict(module.named_parameters(recurse=False)))


def make_routing(tokens: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN), ids, torch.rand(tokens, TOP_K)


gpt_oss = ExpertForm(
    activation="swiglu_oai", alpha=1.702, limit=0.6, interleaved=True, transposed=True
)
MODULES: dict[str, tuple[tuple[Any, ...], dict[str, Any], ExpertForm]] = {
    "qwen3_moe": (("Qwen3MoeExperts",), {}, ExpertForm()),
    "relu": (("Qwen3MoeExperts",), {"hidden_act": "relu"}, ExpertForm(activation="relu")),
    "gelu": (("Qwen3MoeExperts",), {"hidden_act": "gelu"}, ExpertForm(activation="gelu")),
    "gelu_tanh": (
        ("Qwen3MoeExperts",),
        {"hidden_act": "gelu_pytorch_tanh"},
        ExpertForm(activation="gelu_tanh"),
    ),
    "gpt_oss": (("GptOssExperts",), {}, gpt_oss),
    "nemotron_h": (
        ("NemotronHExperts",),
        {},
        ExpertForm(has_gate=False, activation="relu2"),
    ),
    "step3p7": (("Step3p7Experts", 0.3), {}, ExpertForm(limit=0.3, limit_after=True)),
    "deepseek_v4": (("DeepseekV4Experts",), {}, ExpertForm(limit=0.6)),
}


def make_named(name: str) -> tuple[Any, ExpertForm]:
    arguments, config, form = MODULES[name]
    family = "qwen3_moe" if arguments[0] == "Qwen3MoeExperts" else name
    module = make_module(family, *arguments, **config)
    if form.is_limited:
        # Not every version of transformers takes the limit from the configuration.
        module.limit = form.limit
    return module, form


@pytest.mark.parametrize("name", MODULES)
def test_form_of_a_module_is_recognised(name: str) -> None:
    module, form = make_named(name)
    if name == "step3p7":
        # Its experts have the methods of the interface but not yet its attributes.
        module.has_gate, module.is_transposed = True, False
    assert recognise_form(module) == form


def test_a_gate_that_no_kernel_has_is_refused() -> None:
    module = make_module("qwen3_moe", "Qwen3MoeExperts", hidden_act="mish")
    with pytest.raises(UnsupportedModelError, match="gate of Qwen3MoeExperts is none") as caught:
        recognise_form(module)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", MODULES)
def test_ops_give_what_the_module_gives(name: str) -> None:
    module, form = make_named(name)
    x, ids, weights = make_routing()
    expected = module(x, ids, weights)
    out = run_experts_decode(x, ids, weights, bank_of(module), form)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    y = run_grouped_experts_(x.new_zeros(4, TOP_K, HIDDEN), x, ids, bank_of(module), form)
    torch.testing.assert_close(reduce_choices(y, weights), expected, rtol=1e-5, atol=1e-5)


def test_norm_of_each_expert_comes_between_the_ops() -> None:
    muse_spark = pytest.importorskip(
        "transformers.models.muse_spark", reason="this transformers has no experts with a norm"
    )
    assert muse_spark
    module = make_module("muse_spark", "MuseSparkExperts")
    x, ids, weights = make_routing()
    bank = bank_of(module)
    late = ids == 2
    partial = run_resident_experts(x, ids.masked_fill(late, -1), weights, bank, ExpertForm())
    y = run_resident_experts(x, ids.masked_fill(~late, -1), weights, bank, ExpertForm(), partial)
    out = reduce_choices(module.post_expert_norm(y), weights)
    torch.testing.assert_close(out, module(x, ids, weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"activation": "mish"}, "activation is 'mish', expected one of silu, gelu"),
        ({"limit": 0.0}, "limit is 0.0, expected a positive number"),
        ({"limit": math.nan}, "limit is nan, expected a positive number"),
        ({"has_gate": False, "limit": 1.0}, "a limit need experts with a gate"),
        ({"has_gate": False, "interleaved": True}, "interleaved outputs and a limit need"),
    ],
)
def test_impossible_forms_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertForm(**wrong)
