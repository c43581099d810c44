"""Every form of experts module that transformers has: gated or not, biased, transposed, normed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations import moe
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from specmoe_compile.runtime.cpu.engine import open_session
from tests.runtime.fakes import (
    E,
    H,
    K,
    SlowStore,
    experts_layer,
    qwen_experts,
    ram_store,
    randomise,
    reference,
    token_batch,
)


def gpt_oss() -> Any:
    config = SimpleNamespace(
        intermediate_size=INTERMEDIATE,
        num_local_experts=E,
        hidden_size=H,
        swiglu_alpha=1.702,
        swiglu_limit=0.5,
    )
    return GptOssExperts(config)


def aria() -> Any:
    config = SimpleNamespace(moe_num_experts=E, hidden_size=H, intermediate_size=INTERMEDIATE)
    module = AriaExperts(config)
    if not hasattr(module, "num_experts"):
        pytest.skip("this transformers has no transposed experts without biases")
    return module


def nemotron() -> Any:
    config = SimpleNamespace(
        n_routed_experts=E,
        hidden_size=H,
        moe_intermediate_size=INTERMEDIATE,
        moe_latent_size=None,
        mlp_hidden_act="relu2",
    )
    return NemotronHExperts(config)


def normed() -> Any:
    """A Qwen3-MoE experts module with a norm after each expert, as MuseSpark has."""
    if "post_expert_norm" not in inspect.getsource(moe):
        pytest.skip("this transformers has no experts with a norm of their own")
    module = qwen_experts()
    module.has_post_expert_norm = True
    module.post_expert_norm = torch.nn.RMSNorm(H)
    return module


# A whole number of vector registers: activations may round differently in a last, partial one, and
# where that falls depends on how many rows are computed together.
INTERMEDIATE = 64
FORMS: dict[str, Callable[[], Any]] = {
    "interleaved, transposed, biased, clamped": gpt_oss,
    "transposed": aria,
    "not gated": nemotron,
    "normed": normed,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 33])
@pytest.mark.parametrize("form", FORMS)
def test_form_equals_hugging_face_bit_for_bit(form: str, tokens: int, dtype: torch.dtype) -> None:
    module = randomise(FORMS[form]().to(dtype))
    layer = experts_layer(0, module)
    x, ids, weights = token_batch(0, tokens)
    x, weights = x.to(dtype), weights.to(dtype)
    expected = reference(module, x, ids, weights)
    cache_bytes = E // 2 * layer.layout.record_bytes
    store = SlowStore(ram_store([layer]))
    with open_session([layer], store, expert_cache_bytes=cache_bytes, top_k=K) as session:
        for _ in range(2):
            out = session.experts(0, x, ids, weights)
            assert out.dtype == dtype
            assert torch.equal(out, expected)


def test_router_weights_may_be_wider_than_the_experts() -> None:
    """Routers that weigh in float32 keep that precision until the sum, as in transformers."""
    module = randomise(qwen_experts().to(torch.bfloat16))
    layer = experts_layer(0, module)
    x, ids, weights = token_batch(0, 2)
    x = x.bfloat16()
    with open_session([layer], ram_store([layer]), expert_cache_bytes=None, top_k=K) as session:
        out = session.experts(0, x, ids, weights)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, reference(module, x, ids, weights))


def test_layers_may_differ_in_shape() -> None:
    modules = [qwen_experts(), qwen_experts(experts=4, intermediate=16, seed=1)]
    layers = [experts_layer(index, module) for index, module in enumerate(modules)]
    for cache_bytes in (0, 3 * sum(layer.layout.record_bytes for layer in layers)):
        store = SlowStore(ram_store(layers))
        with open_session(layers, store, expert_cache_bytes=cache_bytes, top_k=K) as session:
            for seed in range(12):
                for index, (experts, module) in enumerate(zip((E, 4), modules, strict=True)):
                    batch = token_batch(seed, 1 + seed % 3, experts=experts)
                    out = session.experts(index, *batch)
                    assert torch.equal(out, reference(module, *batch))
