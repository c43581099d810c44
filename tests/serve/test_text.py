"""Text in pieces is the text at once; a stop string is never shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.reference_model.tokenizer import build_tokenizer
from specmoe_compile.serve.text import StopStrings, TextPieces

TOKENIZER = build_tokenizer(256)


@given(st.text(max_size=120), st.integers(1, 5))
def test_pieces_joined_are_the_text(text: str, size: int) -> None:
    pieces = TextPieces(TOKENIZER)
    tokens = TOKENIZER(text).input_ids
    shown = [pieces.add(tokens[at : at + size]) for at in range(0, len(tokens), size)]
    assert "".join(shown) + pieces.rest() == TOKENIZER.decode(tokens, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in shown)


def test_a_space_at_the_start_of_a_line_is_kept() -> None:
    """Decoders of SentencePiece's kind strip the first token's space."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"\n": 0, "▁": 1, "▁▁▁": 2, "▁return": 3, "if": 4}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[])
    backend = tokenizers.Tokenizer(model)
    backend.decoder = tokenizers.decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokens = [4, 0, 2, 3, 0, 1, 4] * 20  # the window of tokens that are decoded again moves on
    pieces = TextPieces(tokenizer)
    text = "".join(pieces.add([token]) for token in tokens) + pieces.rest()
    assert text == "if\n    return\n if" * 20 == tokenizer.decode(tokens)


@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    st.randoms(),
)
def test_the_text_ends_before_the_first_stop_string(text, stops, random) -> None:  # type: ignore[no-untyped-def]
    watcher = StopStrings(stops)
    shown, position, stopped = "", 0, False
    while position < len(text) and not stopped:
        size = random.randint(1, 5)
        piece, stopped = watcher.add(text[position : position + size])
        shown += piece
        position += size
    read = text[:position]
    if stopped:
        first = min(at for stop in stops if (at := read.find(stop)) >= 0)
        assert shown == read[:first]
    else:
        assert not any(stop in text for stop in stops)
        assert shown + watcher.rest() == text
