"""Where virtual tokens start from, and what cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.prompts import TABLE
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.adapters.variants.prefix_tuning import PrefixTuningConfig
from lowrank.adapters.variants.prompt_tuning import PromptTuningConfig
from lowrank.errors import ModelError
from lowrank.generate.generator import Generator
from lowrank.generate.request import GenerationConfig, Prompt, RequestError
from tests.tiny_models import make_base


def test_starts() -> None:
    """From the vocabulary, from a text, or from random numbers; a slot that leaves frees its place."""
    base = make_base("llama")
    base.tokenizer = lambda text: {"input_ids": [ord(letter) - 90 for letter in text]}
    bank = Bank(base)
    table = base.model.get_input_embeddings().weight.clone()
    text = bank.add(
        PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="TEXT", prompt_tuning_init_text="ab"), seed=0
    )
    assert torch.equal(bank.parameters(text)[TABLE], table[[7, 8, 7]])
    drawn = bank.add(PromptTuningConfig(num_virtual_tokens=50), seed=1)
    found = (bank.parameters(drawn)[TABLE][:, None] == table).all(-1)
    assert found.any(1).all()
    assert found.any(0).sum() > 20
    assert torch.equal(Bank(base).base.model.get_input_embeddings().weight, table)
    normal = bank.add(PromptTuningConfig(num_virtual_tokens=500, prompt_tuning_init="RANDOM"), seed=1)
    assert bank.parameters(normal)[TABLE].std().item() == pytest.approx(1, abs=0.02)
    bank.remove(drawn)
    assert bank.num_virtual(drawn) == 0
    assert bank.add(LoraConfig(rank=2), seed=0) == drawn
    assert bank.num_virtual(drawn) == 0


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="TEXT and prompt_tuning_init_text need each other"):
        PromptTuningConfig(prompt_tuning_init="TEXT")
    with pytest.raises(ValueError, match="modules_to_save: "):
        PromptTuningConfig(modules_to_save=("lm_head",))
    with pytest.raises(ValueError, match="only with prefix_projection"):
        PrefixTuningConfig(encoder_hidden_size=4)
    with pytest.raises(ModelError, match=r"needs model\.attention: packed"):
        Bank(make_base("bloom")).add(PromptTuningConfig(), seed=0)
    with pytest.raises(ModelError, match="one shape, which a prefix needs; use prompt_tuning"):
        Bank(make_base("deepseek_v3", v_head_dim=4)).add(PrefixTuningConfig(), seed=0)
    bank = Bank(make_base("llama"))
    generator = Generator(bank.base, bank)
    generator.notice = "because"
    with pytest.raises(RequestError, match="virtual tokens cannot answer here: because"):
        generator.submit(Prompt(np.array([5]), bank.add(PromptTuningConfig(), seed=0)), GenerationConfig())
