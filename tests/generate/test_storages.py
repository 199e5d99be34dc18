"""Answers on every storage of the base: those that its own forward pass gives, base and adapters together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.routing import ForwardContext
from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.generate.generator import Generator
from lowrank.generate.request import GenerationConfig, Prompt
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load, load_tokenizer
from lowrank.pipelines.inference import InferenceModel
from lowrank.settings import configs_in
from tests.serve.running import random_adapter

TEXTS = ["The sea is", "Name a color.", "Many birds live near the river, and some of them"]


@pytest.mark.parametrize("storage", configs_in("lowrank.models.storages"))
def test_a_mixed_batch_says_what_the_model_says(storage: str) -> None:
    settings = ModelConfig.model_validate(
        {"path": "lowrank/tiny", "dtype": "float32", "device": "cpu", "storage": storage}
    )
    tokenizer = load_tokenizer(settings)
    base = load(settings, tokenizer=tokenizer, notify=lambda text: None)
    world = InferenceModel(base, Bank(base), Renderer(tokenizer, DataConfig()))
    slots = [-1, random_adapter(world, "one", 1), random_adapter(world, "two", 2)]
    generator = Generator(base, world.bank)
    prompts = [np.asarray(tokenizer(text)["input_ids"]) for text in TEXTS]
    cases = [(slot, token_L) for slot in slots for token_L in prompts]
    running = [generator.submit(Prompt(token_L, slot), GenerationConfig(max_new_tokens=6)) for slot, token_L in cases]
    described = [generation.result().tokens for generation in running]
    for (slot, token_L), tokens in zip(cases, described):
        known = torch.tensor([[*token_L.tolist(), *tokens]])
        routed = world.bank.routing.using(ForwardContext(known.shape[1], ((slot, 0, known.shape[1]),)))
        with torch.no_grad(), routed, base.using_attention(base.own_attention):
            logits_TV = base.model(input_ids=known, use_cache=False).logits[0]
        assert logits_TV[len(token_L) - 1 : -1].argmax(-1).tolist() == tokens
    assert len({tuple(tokens) for tokens in described}) > 5
