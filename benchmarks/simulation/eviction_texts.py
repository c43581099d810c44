"""Held-out text of eight kinds, and the reference model's routing on it.

The model was trained on the Python standard library: `python` is of the modules that training
never saw, nothing else is of its kind. Texts are what the interpreter, torch's headers,
matplotlib's scripts and this repository hold, and generated ones.

Shape letters: L MoE layers, T tokens, K top-k, E experts; N windows of W tokens.
"""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.reference_model.data import HELD_OUT_FILES, default_source
from specmoe_compile.reference_model import CHECKPOINT_DIR

ROOT = Path(__file__).parents[2]
WINDOW = 1000
"""Tokens that the model sees at once."""
BATCH = 5
TURN = 1500
"""Tokens of a topic in `joined`."""
CYRILLIC = {ord("a") + place: 0x430 + place for place in range(26)}
ASKED = [
    "How do I",
    "Why does",
    "What is the best way to",
    "Can you",
    "Please",
    "Is it possible to",
]
VERBS = ["open", "close", "read", "write", "list", "sort", "find", "remove", "compare", "convert"]
THINGS = [
    "a file",
    "the list",
    "two tables",
    "an error",
    "my key",
    "every line",
    "the last value",
    "a socket",
]
ENDS = [
    "at once",
    "in order",
    "without a loop",
    "by hand",
    "when it is empty",
    "after a crash",
    "again",
]


def texts(characters: int) -> dict[str, str]:
    """Eight kinds of text, at least so many characters each."""
    rng = random.Random(0)
    prose = _read([ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], characters)
    library = Path(torch.__file__).parent
    return {
        "python": _read([default_source() / name for name in HELD_OUT_FILES], characters),
        "c++": _read(sorted((library / "include" / "ATen" / "core").glob("*.h")), characters),
        "javascript": _read(_scripts(library), characters),
        "prose": prose,
        "table": "".join(
            f"{i},{rng.gauss(0, 1):.4f},{rng.choice('NSEW')},{rng.randint(100, 999)}\n"
            for i in range(characters // 14)
        ),
        "log": "".join(_log_line(i, rng) for i in range(characters // 50)),
        "cyrillic": prose.lower().translate(CYRILLIC),
        "chat": "".join(_chat_turn(rng) for _ in range(characters // 30)),
    }


def _scripts(library: Path) -> list[Path]:
    import matplotlib

    found = Path(matplotlib.__file__).parent / "backends" / "web_backend" / "js"
    return [*sorted(found.glob("*.js")), library / "utils" / "model_dump" / "code.js"]


def _log_line(index: int, rng: random.Random) -> str:
    level = rng.choice(("INFO", "INFO", "INFO", "WARN", "ERROR"))
    what = rng.choice(("request served", "cache miss", "retry", "connection closed"))
    return (
        f"2026-11-{index // 8640 + 1:02d}T{index // 360 % 24:02d}:{index // 6 % 60:02d}:07Z {level}"
        f" worker-{rng.randint(1, 9)} {what} id={rng.randint(1000, 99999)} {rng.randint(1, 900)}"
        " ms\n"
    )


def _chat_turn(rng: random.Random) -> str:
    verb, thing, end = rng.choice(VERBS), rng.choice(THINGS), rng.choice(ENDS)
    if rng.random() < 0.5:
        return f"User: {rng.choice(ASKED)} {verb} {thing} {end}?\n"
    return f"Assistant: You {verb} {thing} {end}, then {rng.choice(VERBS)} {rng.choice(THINGS)}.\n"


def _read(files: Iterable[Path], characters: int) -> str:
    text = ""
    for file in files:
        text += file.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= characters:
            break
    return text[:characters]


def load_model() -> Any:
    """The reference model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(CHECKPOINT_DIR, dtype=torch.float32).eval()


def router_logits(model: Any, ids: Tensor) -> Tensor:
    """Of every token and expert: [N, W] int64 -> [L, N * W, E] float32."""
    with torch.no_grad():
        return torch.stack(model(ids, output_router_logits=True).router_logits)


def record(tokens: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """What the routers say of every text.

    Args:
        tokens: of each text, a multiple of WINDOW * BATCH; a text that is shorter ends earlier, at
            a whole window.

    Returns:
        By text, `joined` last: experts, best first, [L, T, K] int16, and all experts' logits,
        [L, T, E] float32; and the SHA-256 of each text's tokens.
    """
    model = load_model()
    logits: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    for name, text in texts(tokens).items():
        data = text.encode()[:tokens]
        data = data[: len(data) // WINDOW * WINDOW]
        ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long().view(-1, WINDOW)
        logits[name] = torch.cat([router_logits(model, part) for part in ids.split(BATCH)], dim=1)
        digests[name] = hashlib.sha256(data).hexdigest()
    logits["joined"] = joined(logits)
    top_k = model.config.num_experts_per_tok
    experts = {name: of.topk(top_k, -1).indices.to(torch.int16) for name, of in logits.items()}
    return experts, logits, digests


def joined(streams: dict[str, Tensor]) -> Tensor:
    """Another text every TURN tokens, each text's own tokens in order: [L, T', E]."""
    length = min(stream.shape[1] for stream in streams.values())
    return torch.cat(
        [
            stream[:, start : start + TURN]
            for start in range(0, length - TURN + 1, TURN)
            for stream in streams.values()
        ],
        dim=1,
    )[:, : max(stream.shape[1] for stream in streams.values())]


def checksum(streams: dict[str, Tensor]) -> int:
    """CRC-32 of the routing, so that two machines can say whether they replay the same."""
    value = 0
    for stream in streams.values():
        value = zlib.crc32(stream.contiguous().numpy().tobytes(), value)
    return value
