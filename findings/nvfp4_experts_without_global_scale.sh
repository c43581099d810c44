#!/usr/bin/env bash
# transformers 5.24.0 + compressed-tensors 0.20.1: experts of a Mixture-of-Experts checkpoint in
# "nvfp4-pack-quantized" are unpacked without their global scale: loading succeeds, and the weights
# are tens of thousands of times too large.
# Exit status 0: as described. 1: it changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 compressed-tensors==0.20.1 \
  safetensors==0.8.0 accelerate==1.15.0
cat > "$work/see.py" <<'P'
import json, sys
from pathlib import Path
import torch, transformers
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
torch.manual_seed(0)
config = transformers.Qwen3MoeConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=64,
    num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_experts=4, num_experts_per_tok=2, pad_token_id=0)
plain = transformers.Qwen3MoeForCausalLM(config)
plain.save_pretrained(folder)
tensors = load_file(folder / "model.safetensors")
args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
        "symmetric": True}
scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args),
                            format="nvfp4-pack-quantized")
compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
for key in [k for k in tensors if k.endswith("_proj.weight")]:
    weight = tensors.pop(key)
    whole = torch.tensor([448 * 6 / float(weight.abs().max())])
    scale = weight.view(len(weight), -1, 16).abs().amax(-1) / 6 * whole
    stored = compressor.compress(
        {"weight": weight, "weight_scale": scale.to(torch.float8_e4m3fn).float(),
         "weight_global_scale": whole}, scheme)
    for name, tensor in stored.items():
        tensors[f"{key.removesuffix('.weight')}.{name}"] = tensor.contiguous()
save_file(tensors, folder / "model.safetensors", {"format": "pt"})
settings = json.loads((folder / "config.json").read_text())
settings["quantization_config"] = {
    "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
    "quantization_status": "compressed", "ignore": ["lm_head", "re:.*mlp.gate$"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}}}
(folder / "config.json").write_text(json.dumps(settings))
loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

def experts_of(model):
    return model.model.layers[0].mlp.experts.down_proj.detach().abs().mean()

experts = float(experts_of(loaded) / experts_of(plain))
print(f"experts: the loaded weights are {experts:.3g} times the original ones")
sys.exit(0 if experts > 100 else 1)
P
"$work/venv/bin/python" "$work/see.py" "$work/model" 2>/dev/null
