"""Log-probabilities of given answers: what the model itself says, for any adapters at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank.adapters.routing import ForwardContext
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.evaluate.likelihood import label_logprobs, perplexity
from tests.tiny_models import make_base, make_engine, random_step


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_equal_to_the_models_own_logits(family: str) -> None:
    engine, slots = make_engine(make_base(family), LoraConfig(rank=4), LoraConfig(rank=2, target_modules=["lm_head"]))
    with torch.no_grad():
        for slot in slots:
            for parameter in engine.bank.parameters(slot).values():
                parameter.add_(0.1)
            engine.bank.refresh(slot)
    segments = random_step(0, [5, 9, 14, 3, 22])
    entries = [((-1, *slots)[index % 3], segment) for index, segment in enumerate(segments)]
    found = label_logprobs(engine.base, engine.bank, entries, micro_batch_tokens=24)
    for (slot, segment), (described, counted) in zip(entries, found):
        token_1T = torch.from_numpy(segment.token_L)[None]
        routed = engine.bank.routing.using(ForwardContext(len(segment), ((slot, 0, len(segment)),)))
        with torch.no_grad(), routed, engine.base.using_attention(engine.base.own_attention):
            logits_TV = engine.base.model(input_ids=token_1T).logits[0].double()
        logprob_T = logits_TV.log_softmax(-1)[:-1].gather(1, token_1T[0, 1:, None])[:, 0]
        picked = torch.from_numpy(segment.weight_L[1:] > 0)
        assert described == pytest.approx(float(logprob_T[picked].sum()), abs=1e-5 if family == "gemma2" else 1e-9)
        assert counted == int(picked.sum())
    assert perplexity(found).value == pytest.approx(float(np.exp(-found[:, 0].sum() / found[:, 1].sum())))
