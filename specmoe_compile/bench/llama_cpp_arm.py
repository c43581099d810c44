"""The arm `llama_cpp`: llama.cpp with the experts mapped from a GGUF file, as it comes.

The process loads neither torch nor transformers: under a memory cap llama.cpp has it all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specmoe_compile.bench.arm import Arm, LoadedArm
from specmoe_compile.bench.peer_files import peer_file
from specmoe_compile.bench.records import ArmJob
from specmoe_compile.bench.timing import TokenClock
from specmoe_compile.errors import SpecMoEError
from specmoe_compile.system.machine import cpu_count

MISSING = (
    "The arm llama_cpp needs the packages gguf and llama-cpp-python: run"
    " pip install 'specmoe-compile[peers]', or leave it out of --arms"
)


def load_llama_cpp(job: ArmJob, arm: Arm) -> LoadedArm:
    """Map the GGUF file; keys and values are float32, as Hugging Face's are here."""
    llama_cpp = _require_llama_cpp()
    path = Path(job.peer_file) if job.peer_file is not None else peer_file(job)
    threads = job.threads or cpu_count()
    longest = max(len(prompt) for prompt in job.prompts)
    kind = llama_cpp.GGML_TYPE_F32 if job.dtype == "float32" else llama_cpp.GGML_TYPE_F16
    model = llama_cpp.Llama(
        model_path=str(path),
        n_ctx=longest + max(job.new_tokens, job.warmup_tokens),
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        use_mmap=True,
        type_k=kind,
        type_v=kind,
        verbose=False,
    )
    version = llama_cpp.__version__
    return LoadedArm(
        model=None,
        inner=None,
        fast_tier_bytes=None,
        generator=_LlamaGenerator(model),
        notes=[
            f"llama-cpp-python {version}: GGUF of {path.stat().st_size} bytes, mapped,"
            f" {threads} threads"
        ],
    )


def _require_llama_cpp() -> Any:
    try:
        import gguf  # noqa: F401
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        # It raises the last two where its library does not load.
        raise SpecMoEError(f"{MISSING} ({error})") from error
    return llama_cpp


class _LlamaGenerator:
    """Greedy decoding through `Llama.eval`, one token a step."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def generate(
        self,
        prompt: list[int],
        new_tokens: int,
        clock: TokenClock,
        *,
        stop_at: int | None = None,
        keep_logits: bool = False,
    ) -> tuple[list[int], Any]:
        """As `arm.Generator.generate`."""
        import llama_cpp
        import numpy as np

        count = new_tokens if stop_at is None else min(new_tokens, stop_at - len(prompt))
        tokens: list[int] = []
        kept: list[Any] = []
        self._model.reset()
        clock.start()
        clock.put(prompt)
        pending = prompt
        for _ in range(count):
            self._model.eval(pending)
            logits = llama_cpp.llama_get_logits_ith(self._model.ctx, -1)
            row = np.ctypeslib.as_array(logits, shape=(self._model.n_vocab(),))
            token = int(row.argmax())
            if keep_logits:
                kept.append(row.copy())
            tokens.append(token)
            clock.put([token])
            pending = [token]
        clock.end()
        return tokens, np.stack(kept) if keep_logits else None
