"""Models of the shapes that people train, with random weights made on the device: nothing is downloaded."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
import transformers
from transformers.initialization import no_init_weights

from benchmarks.gpu_day.device import Device
from benchmarks.workload import QWEN_05B
from lowrank.adapters.bank import Bank
from lowrank.models.base import Base
from lowrank.models.checkpointing.memory_efficient_modules import use_memory_efficient_modules
from lowrank.models.checks.isolation import choose_layout
from lowrank.models.loading.quantize_on_load import linears_to_pack
from lowrank.models.storages import StorageConfig
from lowrank.settings import configs_in

STORAGES = configs_in("lowrank.models.storages")
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 65_536}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "0.5B": ("Qwen2Config", QWEN_05B),
    "Llama-3.1-8B": (
        "LlamaConfig",
        {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, **_IDS},
    ),
    "Qwen2.5-7B": (
        "Qwen2Config",
        {"vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
         "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, **_IDS},
    ),
    "Qwen3-30B-A3B, 4 layers": (
        "Qwen3MoeConfig",
        {"vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
         "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
         "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "norm_topk_prob": True, **_IDS},
    ),
}  # fmt: skip
_TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
_TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 32, "num_experts": 4}
_TINY |= {"num_experts_per_tok": 2}


def config_of(shape: str, tiny: bool) -> Any:
    """Its configuration; in a rehearsal the same family, tiny."""
    name, settings = SHAPES[shape]
    smaller = {key: value for key, value in _TINY.items() if key in settings} if tiny else {}
    return getattr(transformers, name)(**{**settings, **smaller})


def make_model(shape: str, device: Device, tiny: bool, dtype: torch.dtype) -> Any:
    """Weights of size 0.02, norms of 1."""
    with torch.device(device.name), no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config_of(shape, tiny), dtype=dtype)
    generator = torch.Generator(device.name).manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(0.0, 0.02, generator=generator)
            else:
                value.fill_(0.0 if name.endswith("bias") else 1.0)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def sharing(model: Any) -> Any:
    """Another model over the same weights, with transformers' own attention, for somebody else to put adapters on."""
    varlen = model.device.type == "cuda" and importlib.util.find_spec("flash_attn")
    with torch.device("meta"):
        twin = transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(model.config),
            dtype=model.dtype,
            attn_implementation="flash_attention_2" if varlen else "sdpa",
        )
    twin.load_state_dict(model.state_dict(), assign=True)
    for name, value in model.named_buffers():
        path, _, key = name.rpartition(".")
        twin.get_submodule(path)._buffers[key] = value
    twin.tie_weights()
    return twin.eval().requires_grad_(False)


def base_of(model: Any, shape: str, storage: str) -> Base:
    """As `load` leaves a model: packed, lean modules, its layout tested."""
    if storage != "dense":
        settings: StorageConfig = STORAGES[storage]()
        for name, linear in linears_to_pack(model, settings).items():
            model.set_submodule(name, settings.wrap(linear))  # one dense matrix at a time is given back
    use_memory_efficient_modules(model)
    base = Base(model, None, shape)
    choose_layout(base, "auto")
    return base


def bank_of(base: Base) -> Bank:
    """The base's only one, empty: its layers are routed by the bank that wrapped them."""
    bank: Bank = vars(base).setdefault("bank_of_the_day", Bank(base))
    for slot in list(bank.slots):
        bank.remove(slot)
    return bank
