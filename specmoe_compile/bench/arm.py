"""What an arm of `specmoe bench` is: how it loads a model, and how that makes tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from specmoe_compile.bench.records import ArmJob
from specmoe_compile.bench.timing import TokenClock


class Generator(Protocol):
    """Greedy generation at batch 1."""

    def generate(
        self,
        prompt: list[int],
        new_tokens: int,
        clock: TokenClock,
        *,
        stop_at: int | None = None,
        keep_logits: bool = False,
    ) -> tuple[list[int], Any]:
        """Continue a prompt; tells the clock when it starts and of every token.

        Args:
            prompt: token ids.
            new_tokens: tokens to make; no token ends the generation early.
            clock: is started right before the work begins.
            stop_at: stop when prompt and new tokens together are so many; None for `new_tokens`.
            keep_logits: return the logits too.

        Returns:
            New ids, and logits [new tokens, V] float32 (a tensor or an array), None if not kept.
        """
        ...


@dataclass(slots=True, kw_only=True)
class LoadedArm:
    """A model ready to generate.

    Attributes:
        model: has Hugging Face's `generate`; None for another engine.
        inner: the Hugging Face model itself, behind the compile wrapper if there is one.
        fast_tier_bytes: expert bytes kept in the fast tier; None where the operating system
            decides, by its page cache.
        read_stats: returns the session's `Stats`; None without a session.
        notes: what a reader must know.
        generator: makes the tokens where it is not `model.generate`.
    """

    model: Any
    inner: Any
    fast_tier_bytes: int | None
    read_stats: Callable[[], Any] | None = None
    notes: list[str] = field(default_factory=list)
    generator: Generator | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way of running a model; `specmoe bench --help` says in words what each is.

    Attributes:
        load: loads the model of a job, from the arm's options and the job's own.
        policy: specmoe's policy, None without specmoe.
        capped: whether a memory cap applies; arms that hold every expert in RAM cannot keep one.
        options: of `torch.compile(backend="specmoe")`; None for an arm that is not compiled.
        uses_torch: whether its process runs PyTorch; one that does not never loads it.
    """

    load: Callable[[ArmJob, Arm], LoadedArm]
    policy: str | None = None
    capped: bool = True
    options: Mapping[str, Any] | None = None
    uses_torch: bool = True
