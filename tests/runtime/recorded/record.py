"""Writes `values.safetensors`: weights as the formats' own libraries store and dequantise them.

Run by hand where these are installed; the tests read the file and need none of them:

    pip install compressed-tensors==0.20.1 bitsandbytes==0.50.2 torchao==0.18.0 GPTQModel==7.7.0
    python tests/runtime/recorded/record.py

Keys are `case/tensor`; `case/value` is the library's float32 (or rounded) weight [N, K].
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

N, K, GROUP = 32, 64, 32


def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.05


def record_compressed_tensors(out: dict[str, torch.Tensor]) -> None:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    w = weight()
    groups = w.view(N, -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    steps = (high - low) / 15
    zeros = (-8 - low / steps).round().clamp(-8, 7).to(torch.int8)
    whole = torch.tensor([448 * 6 / float(w.abs().max())])
    fine = w.view(N, -1, 16).abs().amax(-1)
    powers = 2.0 ** torch.floor(torch.log2(groups.abs().amax(-1) / 6))
    integer = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    fp4 = {"num_bits": 4, "type": "float", "symmetric": True}
    blocks = w.view(2, 16, 2, 32).abs().amax((1, 3)) / 448
    cases: list[tuple[str, str, dict[str, Any], dict[str, torch.Tensor]]] = [
        (
            "ct_int4",
            "pack-quantized",
            {**integer, "symmetric": True},
            {"weight_scale": (groups.abs().amax(-1) / 7.5).bfloat16()},
        ),
        (
            "ct_int4_zeros",
            "pack-quantized",
            {**integer, "symmetric": False},
            {"weight_scale": steps.bfloat16(), "weight_zero_point": zeros},
        ),
        (
            "ct_int8",
            "int-quantized",
            {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
            {"weight_scale": w.abs().amax(-1, keepdim=True) / 127},
        ),
        (
            "ct_fp8_channel",
            "float-quantized",
            {**fp8, "strategy": "channel"},
            {"weight_scale": w.abs().amax(-1, keepdim=True) / 448},
        ),
        (
            "ct_fp8_tensor",
            "float-quantized",
            {**fp8, "strategy": "tensor"},
            {"weight_scale": (w.abs().amax() / 448).reshape(1)},
        ),
        (
            "ct_fp8_block",
            "float-quantized",
            {**fp8, "strategy": "block", "block_structure": [16, 32]},
            {"weight_scale": blocks},
        ),
        (
            "ct_nvfp4",
            "nvfp4-pack-quantized",
            {**fp4, "strategy": "tensor_group", "group_size": 16},
            {
                "weight_scale": (fine / 6 * whole).to(torch.float8_e4m3fn).float(),
                "weight_global_scale": whole,
            },
        ),
        (
            "ct_mxfp4",
            "mxfp4-pack-quantized",
            {**fp4, "strategy": "group", "group_size": GROUP},
            {"weight_scale": powers},
        ),
    ]
    for name, format, args, tensors in cases:
        scheme = QuantizationScheme(
            targets=["Linear"], weights=QuantizationArgs(**args), format=format
        )
        compressor = BaseCompressor.get_value_from_registry(format)
        stored = compressor.compress({"weight": w.clone(), **tensors}, scheme)
        keep(out, name, stored, compressor.decompress(dict(stored), scheme)["weight"])


def record_bitsandbytes(out: dict[str, torch.Tensor]) -> None:
    from bitsandbytes import functional

    for name, nested in (("nf4", False), ("nf4_nested", True)):
        packed, state = functional.quantize_4bit(
            weight(), quant_type="nf4", blocksize=64, compress_statistics=nested
        )
        stored = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        keep(
            out,
            name,
            {**stored, "weight": packed},
            functional.dequantize_4bit(packed, state),
        )


def record_torchao(out: dict[str, torch.Tensor]) -> None:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    mx = MXTensor.to_mx(weight().bfloat16(), torch.float4_e2m1fn_x2, 32)
    stored = {"weight_packed": mx.qdata, "weight_scale": mx.scale.view(torch.uint8)}
    keep(out, "ao_mxfp4", stored, mx.dequantize(torch.float32))
    whole = torch.tensor(0.001)
    nv = NVFP4Tensor.to_nvfp4(weight().bfloat16(), per_tensor_scale=whole)
    stored = {"weight": nv.qdata, "weight_scale": nv.scale, "weight_scale_2": whole}
    keep(out, "ao_nvfp4", stored, nv.dequantize(torch.float32))


def record_gptqmodel(out: dict[str, torch.Tensor]) -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    w = weight()
    groups = w.view(N, -1, GROUP)
    scales = ((groups.amax(-1) - groups.amin(-1)) / 15).half().float()
    zeros = (-groups.amin(-1) / scales).round().clamp(1, 15)
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = w.clone()
    settings: dict[str, Any] = {
        "bits": 4,
        "group_size": GROUP,
        "sym": False,
        "desc_act": False,
        "in_features": K,
        "out_features": N,
    }
    order = (torch.arange(K) // GROUP).int()
    gptq = TorchLinear(**settings, format="gptq_v2")
    gptq.pack_original(linear, scales.clone(), zeros.clone(), order)
    gptq.post_init()
    value = gptq.dequantize_weight().t()
    keep(out, "gptqmodel_v2", gptq.state_dict(), value)
    asked = SimpleNamespace(bits=4, pack_dtype=torch.int32)  # all that it reads
    convert_gptq_v2_to_v1_format_module(gptq, asked)
    keep(out, "gptqmodel", gptq.state_dict(), value)
    awq = AwqTorchLinear(**settings)
    awq.pack(linear, scales.clone(), zeros.clone())
    value = awq._dequantize_weight_for_inference(torch.empty(0), dtype=torch.float16).t()
    keep(out, "gptqmodel_awq", awq.state_dict(), value)


def keep(
    out: dict[str, torch.Tensor], name: str, stored: dict[str, Any], value: torch.Tensor
) -> None:
    for key, tensor in {**stored, "value": value.float()}.items():
        out[f"{name}/{key}"] = tensor.detach().clone().contiguous()
    print(name, {key: (tuple(t.shape), t.dtype) for key, t in stored.items()}, value.dtype)


if __name__ == "__main__":
    found: dict[str, torch.Tensor] = {}
    record_compressed_tensors(found)
    record_bitsandbytes(found)
    record_torchao(found)
    record_gptqmodel(found)
    save_file(found, Path(__file__).with_name("values.safetensors"))
