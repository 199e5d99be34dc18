"""Answers on every storage of the base: those that its own forward pass gives, base and adapters together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank.adapters.bank import Bank
from lowrank.data.config import Config as DataConfig
from lowrank.data.rendering import Renderer
from lowrank.generate.generator import Generator
from lowrank.generate.request import Config, Prompt
from lowrank.models.config import Config as ModelConfig
from lowrank.models.loading import load, load_tokenizer
from lowrank.settings import configs_in
from lowrank.trained import Trained
from tests.serve.running import random_adapter

TEXTS = ["The sea is", "Name a colour.", "Many birds live near the river, and some of them"]


@pytest.mark.parametrize("storage", configs_in("lowrank.models.storages"))
def test_a_mixed_batch_says_what_the_model_says(storage: str) -> None:
    settings = ModelConfig.model_validate(
        {"path": "lowrank/tiny", "dtype": "float32", "device": "cpu", "storage": storage}
    )
    tokenizer = load_tokenizer(settings)
    base = load(settings, tokenizer=tokenizer, notify=lambda text: None)
    world = Trained(base, Bank(base), Renderer(tokenizer, DataConfig()))
    slots = [-1, random_adapter(world, "one", 1), random_adapter(world, "two", 2)]
    generator = Generator(base, world.bank)
    prompts = [np.asarray(tokenizer(text)["input_ids"]) for text in TEXTS]
    cases = [(slot, token_L) for slot in slots for token_L in prompts]
    running = [generator.submit(Prompt(token_L, slot), Config(max_new_tokens=6)) for slot, token_L in cases]
    said = [generation.result().tokens for generation in running]
    for (slot, token_L), tokens in zip(cases, said):
        known = torch.tensor([[*token_L.tolist(), *tokens]])
        world.bank.routing.set(known.shape[1], ((slot, 0, known.shape[1]),))
        with torch.no_grad(), base.using_attention(base.own_attention):
            logits_TV = base.model(input_ids=known, use_cache=False).logits[0]
        assert logits_TV[len(token_L) - 1 : -1].argmax(-1).tolist() == tokens
    assert len({tuple(tokens) for tokens in said}) > 5
