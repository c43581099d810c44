#!/usr/bin/env bash
# torch 2.13.0 with transformers 5.24.0: nested_compile_region is there to trace equal layers once
# and reuse that. Of six decoder layers five reuse the first without a cache of keys and values;
# with one none does: an argument that is no tensor, number or module rules reuse out ("not
# eligible"). Dynamo traces each layer of a decode step anew, and the mark shortens nothing there.
# Exit status 0: as described. 1: it changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cat > "$work/see.py" <<'P'
import logging, sys
import torch, transformers
from transformers import Qwen3Config, Qwen3ForCausalLM, StaticCache

LAYERS, HEAD = 6, 16
said = []


class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


logger = logging.getLogger("torch._dynamo.variables.invoke_subgraph.__hierarchical_compile")
logger.addHandler(Keep())
logger.propagate = False
config = Qwen3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=HEAD,
)
model = Qwen3ForCausalLM(config).eval()
layer = type(model.model.layers[0])
layer.forward = torch.compiler.nested_compile_region(layer.forward)


def layers(words, **given):
    """Of how many layers a compiled step of one token says so."""
    torch._dynamo.reset()
    said.clear()
    with torch.no_grad():
        torch.compile(model, backend="eager")(torch.ones(1, 1, dtype=torch.long), **given)
    return {word: sum(word in line for line in said) for word in words}


words = ("cache hit", "not eligible")
cache = StaticCache(config=config, max_cache_len=8)
cache.early_initialization(1, 1, HEAD, torch.float32, "cpu")
without = layers(words, use_cache=False)
with_cache = layers(words, past_key_values=cache)
print(f"torch {torch.__version__}, transformers {transformers.__version__}, {LAYERS} layers")
print(f"without a cache: {without}, with a static cache: {with_cache}")
expected = {"cache hit": LAYERS - 1, "not eligible": 0}, {"cache hit": 0, "not eligible": LAYERS}
sys.exit(0 if (without, with_cache) == expected else 1)
P
TORCH_LOGS="+hierarchical_compile" "$work/venv/bin/python" "$work/see.py"
