"""Byte-level tokenizer of the reference model: token id b is byte b; 256 ends a text, 257 pads.

Built on the `tokenizers` library's ByteLevel pieces, so that `AutoTokenizer` loads it without
remote code and any UTF-8 text comes back unchanged.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS_ID = 256
PAD_ID = 257
VOCAB_SIZE = 258
EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"


def byte_to_char() -> list[str]:
    """Return the printable character that ByteLevel uses for each of the 256 bytes.

    Printable Latin-1 bytes stand for themselves; the others are moved to U+0100 and up, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    chars, moved = [], 0
    for byte in range(256):
        if byte in printable:
            chars.append(chr(byte))
        else:
            chars.append(chr(0x100 + moved))
            moved += 1
    return chars


def build_tokenizer(model_max_length: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer.

    Args:
        model_max_length: longest input in tokens, written into the tokenizer's configuration.

    Returns:
        A fast tokenizer with 258 entries: 256 bytes, `<|endoftext|>` and `<|pad|>`.
    """
    vocab = {char: byte for byte, char in enumerate(byte_to_char())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
        padding_side="left",
    )
    if (fast.eos_token_id, fast.pad_token_id, len(fast)) != (EOS_ID, PAD_ID, VOCAB_SIZE):
        raise RuntimeError(
            f"the tokenizer library gave ids {fast.eos_token_id}, {fast.pad_token_id} and "
            f"{len(fast)} entries, expected {EOS_ID}, {PAD_ID} and {VOCAB_SIZE}"
        )
    return fast
