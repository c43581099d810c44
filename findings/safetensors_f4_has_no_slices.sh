#!/usr/bin/env bash
# safetensors 0.8.0: a tensor of dtype F4 (torch.float4_e2m1fn_x2) is saved and read whole, but
# `get_slice(name)[...]` raises for every index, while F8_E8M0, as new, can be sliced. Code that
# reads experts by rows works for MXFP4's scales and fails for its codes.
# Exit status 0: as described. 1: it changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 safetensors==0.8.0 numpy
cat > "$work/see.py" <<'P'
import sys
import torch
from safetensors import safe_open
from safetensors.torch import save_file

path = sys.argv[1]
codes = torch.arange(64, dtype=torch.uint8).view(4, 16)
save_file({"codes": codes.clone().view(torch.float4_e2m1fn_x2),
           "scales": codes.clone().view(torch.float8_e8m0fnu)},
          path)
seen = {}
with safe_open(path, "pt") as file:
    for name in ("codes", "scales"):
        whole = file.get_tensor(name)
        print(f"{name}: get_tensor gives {tuple(whole.shape)} {whole.dtype}")
        for text, index in (("[:]", slice(None)), ("[0]", 0), ("[1:3]", slice(1, 3)), ("[...]", ...)):
            try:
                file.get_slice(name)[index]
                seen[name, text] = "works"
            except Exception as error:
                seen[name, text] = f"raises {type(error).__name__}: {str(error).splitlines()[0]}"
            print(f"{name}: get_slice{text} {seen[name, text]}")
fails = all(what != "works" for (name, _), what in seen.items() if name == "codes")
works = all(what == "works" for (name, _), what in seen.items() if name == "scales")
sys.exit(0 if fails and works else 1)
P
"$work/venv/bin/python" "$work/see.py" "$work/tensors.safetensors"
