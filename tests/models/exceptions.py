"""Families that do not do all of what the walk checks, each with its precise reason.

A family that is not here is exact in every case, has no graph break, and has every MoE layer but
the first predicted. The walk fails when a reason changes, and when it goes away.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Exceptional:
    """How one family departs from the rule.

    Attributes:
        note: what the manual says, and why; for people.
        impossible: (cache, batch) -> pattern of the error that the unmodified eager model raises.
        differences: patterns, one for each difference from the eager model.
        graph_breaks: patterns, one for each reason of Dynamo's; stock transformers, compiled by
            PyTorch alone, breaks the graph for the same ones.
        unpredicted: MoE layer -> pattern of the reason.
        unused: MoE layers that no text token reaches, so that no graph holds them.
        only_prefill: every graph is one of prefill, where sessions predict nothing.
    """

    note: str
    impossible: dict[tuple[str, int], str] = field(default_factory=dict)
    differences: tuple[str, ...] = ()
    graph_breaks: tuple[str, ...] = ()
    unpredicted: dict[int, str] = field(default_factory=dict)
    unused: int = 0
    only_prefill: bool = False


_ALONE = "it is the first MoE layer: nothing comes before it to predict it from"

EXCEPTIONS: dict[str, Exceptional] = {
    "deepseek_v4": Exceptional(
        note=(
            "dynamic cache only: the unmodified model itself fails with a static one"
            " (`KeyError: 'heavily_compressed_attention'`)"
        ),
        impossible={
            ("static", batch): "KeyError: 'heavily_compressed_attention'" for batch in (1, 3)
        },
    ),
    "diffusion_gemma": Exceptional(
        note=(
            "no speculation: each step denoises a whole block of tokens, as many as in prefill."
            " Checked are steps of its compiled `forward`: its own `generate` draws random numbers,"
            " and calls `forward` past the compiled function, with its experts offloaded"
        ),
        only_prefill=True,
    ),
    "ernie4_5_vl_moe": Exceptional(
        note="half of its MoE layers are for images, and no text token reaches them", unused=3
    ),
    "glm5_next": Exceptional(
        note=(
            "no speculation: its sparse attention selects with a mask of data"
            " (`pool_keys[:, keep]`), where Dynamo breaks the graph, with stock transformers as"
            " well; no graph holds two MoE layers. With"
            " `torch._dynamo.config.capture_dynamic_output_shape_ops = True` and"
            ' `lowering="eager"` there is one graph, with speculation'
        ),
        graph_breaks=(r"aten\.nonzero",),
        unpredicted=dict.fromkeys((1, 2), _ALONE),
    ),
    "openai_privacy_filter": Exceptional(
        note="a token classifier: no class of the file generates text"
    ),
    "qwen4_exp": Exceptional(
        note=(
            "no speculation: its sparse attention selects tokens in a loop over data"
            " (`torch.nonzero`), where Dynamo breaks the graph, with stock transformers as well; no"
            " graph holds two MoE layers"
        ),
        graph_breaks=(r"aten\.nonzero",),
        unpredicted=dict.fromkeys((1, 2, 3), _ALONE),
    ),
}
