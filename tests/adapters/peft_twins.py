"""PEFT's model of an adapter in the bank: the oracle of variants, for tests and for docs/methods.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.bottleneck import BottleneckSettings
from lowrank.adapters.prompts import PromptSettings
from lowrank.adapters.routing import ForwardContext
from lowrank.adapters.variants.pissa import Shifted
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import AdapterOnDisk, save_adapter
from lowrank.models.base import Base
from lowrank.settings import configs_in
from tests.tiny_models import make_model

ALL: dict[str, Any] = configs_in("lowrank.adapters.variants")
VARIANTS = {
    name: config for name, config in ALL.items() if not issubclass(config, (PromptSettings, BottleneckSettings))
}
"""Those that change layers."""
TOKEN = torch.tensor([[5, 9, 11, 3, 8], [7, 7, 4, 60, 90]])
SHIFTED = [name for name, config in VARIANTS.items() if isinstance(config().build(), Shifted)]
"""Those that PEFT trains on a base it has altered."""


def config_of(name: str, family: str = "llama") -> Any:
    """Different ranks, and alphas, where the method has them."""
    own: dict[str, Any] = {"rank": 4, "alpha": 6.0}
    if "block_size" in VARIANTS[name].model_fields:
        own["block_size"] = 8
    elif "rank_pattern" not in VARIANTS[name].refused:
        names = ("c_attn", "c_fc") if family == "gpt2" else ("v_proj", "o_proj")
        own["rank_pattern"] = {names[0]: 2}
        if "alpha_pattern" not in VARIANTS[name].refused:
            own["alpha_pattern"] = {names[1]: 3.0}
    return VARIANTS[name](**own)


def moved(bank: Bank, slot: int, size: float = 0.2) -> None:
    """Away from the start, by random numbers."""
    with torch.no_grad():
        for index, parameter in enumerate(bank.parameters(slot).values()):
            generator = torch.Generator().manual_seed(100 * slot + index)
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    bank.refresh(slot)


@torch.no_grad()
def logits(bank: Bank, slot: int) -> torch.Tensor:
    with bank.routing.using(ForwardContext(TOKEN.numel(), ((slot, 0, TOKEN.numel()),))):
        return bank.base.model(TOKEN).logits


def on_disk(bank: Bank, slot: int) -> AdapterOnDisk:
    saved = bank.saved(slot)
    return AdapterOnDisk(saved.config, saved.tensors, saved.ranks)


def new_bank(family: str = "llama") -> Bank:
    return Bank(Base(make_model(family), None, family))


def twin_of(bank: Bank, slot: int, folder: Path, family: str = "llama") -> tuple[Any, dict[str, Any]]:
    """PEFT's model of a slot's adapter, ready to train; its parameters by our names. PiSSA and OLoRA: on the residual
    base that PEFT would have made."""
    name, model = bank.slots[slot].config.type, make_model(family)
    adapter = on_disk(bank, slot)
    if name in SHIFTED:
        config = bank.slots[slot].config
        plain = VARIANTS["lora"](**config.shared())
        tensors = {}
        for path, layer in bank.slots[slot].layers.items():
            own = layer.masters
            model.get_submodule(path).weight -= layer.scale * own["start_B"] @ own["start_A"]
            tensors |= {f"{path}.{key}.weight": own[key].detach() for key in ("lora_A", "lora_B")}
        adapter = AdapterOnDisk(plain, tensors, bank.slots[slot].ranks)
    save_adapter(folder, adapter, describe_base(model, family), dtype=None)
    twin = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True, autocast_adapter_dtype=False).eval()
    own = {
        key.removeprefix("base_model.model.").replace(".default", ""): parameter
        for key, parameter in twin.named_parameters()
        if parameter.requires_grad
    }
    return twin, {key.replace("magnitude_vector.weight", "magnitude_vector"): value for key, value in own.items()}
