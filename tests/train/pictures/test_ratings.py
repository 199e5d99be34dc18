"""KTO about pictures, by its definition, each document alone in transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.data.batching.mismatched import with_mismatched
from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.prepare import prepare
from lowrank.objectives.kto import KTOConfig
from lowrank.records import Rated
from lowrank.segments import MISMATCHED, REJECTED, Segment
from lowrank.train.optimizers.adamw import AdamWConfig
from lowrank.train.reference import References
from tests.media_oracle import alone_loss
from tests.peft_oracle import peft_twin
from tests.tiny_models import make_engine, pretend_learned
from tests.tiny_vision_models import make_vision_model
from tests.vision_bases import segments_of, vision_base


def test_rated_answers_about_pictures(tmp_path: Path, rows: Path) -> None:
    """KTO by its definition, of log-probabilities of each document alone by transformers and PEFT: prompts that other
    rows' answers are put behind keep their own pictures."""
    base, tokenizer, _ = vision_base(tmp_path / "m", "qwen3_vl")
    pictures = [row["images"][0] for row in json.loads(rows.read_text("utf-8"))[:3]]
    path = tmp_path / "rated.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": answer}],
         "label": label, "images": [picture]}
        for answer, label, picture in zip(("A player.", "Nobody.", "Two of them."), (True, False, True), pictures)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataConfig(
        train=(SourceConfig(path=str(path), media_dir=str(rows.parent)),), shuffle=False, batch_size=3, max_length=2048
    )
    step = prepare(config, tokenizer=tokenizer, record=Rated, seed=0, mismatched=True).train.next_step()
    assert [each.role == MISMATCHED for each in step] == [False, True] * 3
    assert all(each.media is not None and each.media == step[place & ~1].media for place, each in enumerate(step))
    engine, _ = make_engine(base)
    slot = engine.bank.add(LoraConfig(rank=2), seed=0)
    engine.add(slot, KTOConfig(beta=0.5).build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
    pretend_learned(engine, slot, seed=1)
    references = References(engine, None)
    references.prepare(step)
    forwarded = engine.forward_backward({slot: references.attach(step)})
    ours = engine.bank.parameters(slot)
    targets = sorted({name.partition(".lora_")[0] for name in ours})
    twin, theirs = peft_twin(
        make_vision_model("qwen3_vl", torch.float64), ours, r=2, lora_alpha=engine.bank.slots[slot].config.alpha or 4,
        target_modules="|".join(targets).replace(".", r"\."),
    )  # fmt: skip

    def ratio(segment: Segment) -> torch.Tensor:
        total = float(segment.weight_L.sum())
        with twin.disable_adapter(), torch.no_grad():
            before = alone_loss(twin, base, [segment])
        return (before - alone_loss(twin, base, [segment])) * total

    with torch.no_grad():
        kl = max(0.0, float(sum(ratio(each) for each in step if each.role == MISMATCHED) / 3))
    loss = torch.zeros((), dtype=torch.float64)
    for each in step:
        if each.role != MISMATCHED:
            sign = -1.0 if each.role == REJECTED else 1.0
            loss = loss + (1 - torch.sigmoid(0.5 * sign * (ratio(each) - kl))) / 3
    loss.backward()
    assert forwarded[slot].loss == pytest.approx(loss.item(), abs=1e-6)  # references are float32
    for name, parameter in ours.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-6)


def test_the_same_words_about_another_picture_are_another_question(tmp_path: Path, rows: Path) -> None:

    _, tokenizer, _ = vision_base(tmp_path, "llava")
    first, one, other, *_ = segments_of(rows, tokenizer)
    assert one.media is not None
    assert other.media is not None
    question = replace(one, media=replace(one.media, items=other.media.items))
    made = list(with_mismatched([(first,), (one,), (question,)], 4096))
    answer_L = one.token_L[int(np.flatnonzero(one.weight_L)[0]) :]
    assert (made[2][1].token_L[-len(answer_L) :] == answer_L).all(), "the nearest row before"
