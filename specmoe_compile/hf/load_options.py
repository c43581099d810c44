"""Options that users give the Hugging Face loader: passed on, without meaning here, or refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

# What callers may add, for the message about an unknown option.
_OWN_OPTIONS = (
    "device",
    "dtype",
    "quantize",
    "store",
    "expert_cache",
    "store_dir",
    "cache_policy",
    "reader_threads",
    "verify",
    "progress",
    "missing_weights",
    "adapter",
)
HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
LOADER_OPTIONS = (
    "attn_implementation",
    "code_revision",
    "config",
    "distributed_config",
    "generation_config",
    "key_mapping",
    "trust_remote_code",
    "variant",
)
_REFUSED_OPTIONS = {
    "device_map": "the model computes on one device, use device='cpu' or device='cuda'",
    "max_memory": "use expert_cache=",
    "offload_folder": "use store_dir=",
    "torch_dtype": "use dtype=",
    "quantization_config": "specmoe reads the checkpoint's own; quantize= packs at 4 or 8 bit",
    "load_in_4bit": "use quantize='int4'",
    "load_in_8bit": "use quantize='int8'",
    "ignore_mismatched_sizes": "the weights must fit the configuration",
    "output_loading_info": "weights that are missing are an error, see missing_weights=",
    "from_tf": "specmoe reads safetensors",
    "from_flax": "specmoe reads safetensors",
    "weights_only": "specmoe reads safetensors, which hold nothing else",
    "use_safetensors": "specmoe reads safetensors only",
    "experts_implementation": "an offloaded model runs specmoe's own",
    "state_dict": "load the model with transformers and use specmoe_compile.offload",
    "gguf_file": "specmoe reads safetensors",
    "tp_plan": "use distributed_config=DistributedConfig(tp_size=N, ep_size=N) under torchrun",
    "tp_size": "use distributed_config=DistributedConfig(tp_size=N, ep_size=N) under torchrun",
}
# Options that users give by habit, and the values that ask for nothing else than is done anyway.
_HARMLESS_OPTIONS: dict[str, tuple[Any, ...]] = {
    "device_map": ("auto",),
    "low_cpu_mem_usage": (True, False),
    "load_in_4bit": (False,),
    "load_in_8bit": (False,),
    "offload_state_dict": (True, False),
    "offload_buffers": (False,),
    "ignore_mismatched_sizes": (False,),
    "output_loading_info": (False,),
    "weights_only": (True,),
    "use_safetensors": (True,),
    "from_tf": (False,),
    "from_flax": (False,),
    "resume_download": (True, False),
}


def checked_options(hf_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that mean something; raises `ValueError` for those against offloading.

    An option that is None, or asks for what is done anyway, is left out.
    """
    options: dict[str, Any] = {}
    for name, value in hf_options.items():
        ours = name in _REFUSED_OPTIONS or name in _HARMLESS_OPTIONS
        if ours and (value is None or _is_harmless(name, value)):
            continue
        if name in _REFUSED_OPTIONS:
            raise ValueError(
                f"{name}={value!r} cannot be combined with offloading: {_REFUSED_OPTIONS[name]}."
            )
        options[name] = value
    return options


def _is_harmless(name: str, value: Any) -> bool:
    return any(type(value) is type(ok) and value == ok for ok in _HARMLESS_OPTIONS.get(name, ()))


def refuse_unknown(names: Sequence[str], config_name: str) -> None:
    """Raise `ValueError` at the first of some options that nobody knows, with a guess."""
    for name in names:
        valid = [*_OWN_OPTIONS, *HUB_OPTIONS, *LOADER_OPTIONS]
        close = difflib.get_close_matches(name, valid, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"Unknown option {name!r}.{hint} Valid are {', '.join(valid)}, and the fields of "
            f"{config_name}."
        )
