"""What adapters of virtual tokens answer, PEFT as oracle."""

from __future__ import annotations

import numpy as np
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.generate.generator import Generator, GeneratorConfig
from lowrank.generate.request import GenerationConfig, Prompt
from lowrank.generate.sampler import generate
from tests.adapters.prompts.cases import (
    CASES,
    PROMPTS,
    K,
    Peer,
    every_case,
    families,
    peer_of,
)
from tests.tiny_models import make_base, make_engine


@families("llama", "gpt2")
@every_case
def test_answers_equal_pefts(case: str, family: str) -> None:
    """Greedy, beside the bare base and a LoRA, in pieces of 4 tokens, a second time from the kept pages. The peer reads
    all for each token: `generate` of PEFT 0.21 under transformers 5.24 gives other tokens than its own forward."""
    engine, (lora, slot) = make_engine(make_base(family), LoraConfig(rank=4), CASES[case])
    twin, _ = peer_of(case, family, engine.bank.parameters(slot))
    token_L = np.array([5, 9, 11, 3, 8, 7])
    theirs = token_L.tolist()
    with torch.no_grad():
        for _ in range(12):
            theirs.append(int(Peer(twin)(torch.tensor(theirs)[None]).logits[0, -1].argmax()))
    alone = {
        each: generate(
            engine.base,
            engine.bank,
            [Prompt(token_L, each)],
            GenerationConfig(max_new_tokens=12),
            stop_tokens=frozenset(),
        )[0]
        for each in (-1, lora)
    }
    generator = Generator(engine.base, engine.bank, GeneratorConfig(max_num_batched_tokens=4))
    for _ in range(2):
        requested = {
            each: generator.submit(Prompt(token_L, each), GenerationConfig(max_new_tokens=12))
            for each in (slot, -1, lora)
        }
        answers = {each: generation.result() for each, generation in requested.items()}
        assert answers[slot].tokens == theirs[6:]
        assert answers[slot].prompt_tokens == 6
        assert {each: answers[each].tokens for each in alone} == alone
    assert generator.base.max_positions == 64
    reach = generator.submit(Prompt(token_L, slot), GenerationConfig(max_new_tokens=500)).result()
    assert len(reach.tokens) == 64 - 6 - K


def test_repetition_is_counted_over_words_alone() -> None:
    """Virtual tokens are no token 0 that was said."""
    engine, (slot,) = make_engine(make_base("llama"), PROMPTS["prompt_tuning"])
    config = GenerationConfig(max_new_tokens=1, logit_bias={0: 1000.0}, repetition_penalty=1e6)
    found = generate(engine.base, engine.bank, [Prompt(np.array([5, 9]), slot)], config, stop_tokens=frozenset())
    assert found == [[0]]
