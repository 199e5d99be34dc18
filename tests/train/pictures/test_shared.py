"""What is done once in a step for pictures that several jobs and answers have: decoding, and the frozen tower."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.prepare import prepare
from lowrank.media.processor import MediaProcessor
from lowrank.models.shared_features import SharedFeatures
from lowrank.objectives.dpo import DPOConfig
from lowrank.records import Preference
from lowrank.train.optimizers.adamw import AdamWConfig
from lowrank.train.reference import References
from tests.picture_rows import write_picture_rows
from tests.tiny_models import make_engine
from tests.vision_bases import segments_of, vision_base


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_picture_rows(tmp_path_factory.mktemp("rows"))


class Counted:
    """How often each document was decoded, in which threads, and how often the tower looked."""

    def __init__(self, base: Any, patch: pytest.MonkeyPatch) -> None:
        self.decoded: Counter[Any] = Counter()
        self.threads: set[str] = set()
        self.looks = 0
        inputs = MediaProcessor.inputs

        def counting(processor: MediaProcessor, media: Any) -> Any:
            self.decoded[tuple(media)] += 1
            self.threads.add(threading.current_thread().name.partition("_")[0])
            return inputs(processor, media)

        def looked(*_: Any) -> None:
            self.looks += 1

        patch.setattr(MediaProcessor, "inputs", counting)
        base.backbone.visual.register_forward_hook(looked)

    def taken(self) -> tuple[set[int], set[str], int]:
        found = set(self.decoded.values()), set(self.threads), self.looks
        self.decoded.clear()
        self.threads.clear()
        self.looks = 0
        return found


def gradients_of(engine: Any, slots: Any) -> dict[tuple[int, str], torch.Tensor]:
    found = {}
    for slot in slots:
        for name, parameter in engine.bank.parameters(slot).items():
            if parameter.grad is not None:
                found[slot, name], parameter.grad = parameter.grad, None
    return found


@pytest.mark.parametrize("micro_batch_tokens", [200, 4096])
def test_jobs_on_the_same_rows_decode_and_look_once(
    micro_batch_tokens: int, tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tokenizer, _ = vision_base(tmp_path, "qwen3_vl", "float32")
    segments = segments_of(rows, tokenizer)[1:4]
    documents = len({each.media.items for each in segments if each.media is not None})
    engine, slots = make_engine(base, *[LoraConfig(rank=2)] * 3, micro_batch_tokens=micro_batch_tokens)
    work = dict.fromkeys(slots, segments)
    with monkeypatch.context() as patch:
        patch.setattr(SharedFeatures, "expect", lambda *_: None)
        apart = engine.forward_backward(work)
        before = gradients_of(engine, slots)
    counted = Counted(base, monkeypatch)
    together = engine.forward_backward(work)
    assert counted.taken() == ({1}, {"pictures"}, documents)
    assert [together[slot].loss for slot in slots] == [apart[slot].loss for slot in slots]
    after = gradients_of(engine, slots)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before), "the same bits"
    assert not base.media_encoder.shared._kept, "nothing outlives its step"
    assert not engine.passes.prefetcher._coming


def test_the_next_steps_pictures_wait_through_an_evaluation(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tokenizer, _ = vision_base(tmp_path, "qwen3_vl", "float32")
    first, second, third, *_ = segments_of(rows, tokenizer)
    engine, slots = make_engine(base, LoraConfig(rank=2), LoraConfig(rank=2), micro_batch_tokens=200)
    counted = Counted(base, monkeypatch)
    engine.forward_backward({key: [first] for key in slots}, next_segments=[third])
    engine.evaluate({key: [second] for key in slots})
    engine.forward_backward({key: [third] for key in slots})
    assert counted.taken() == ({1}, {"pictures"}, 3)


def test_adapted_towers_look_for_themselves(tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tokenizer, _ = vision_base(tmp_path, "qwen3_vl", "float32")
    segments = segments_of(rows, tokenizer)[1:3]
    frozen, adapted = LoraConfig(rank=2), LoraConfig(rank=2, freeze_vision_tower=False)
    engine, slots = make_engine(base, frozen, adapted, frozen, adapted, micro_batch_tokens=200)
    counted = Counted(base, monkeypatch)
    engine.forward_backward(dict.fromkeys(slots, segments))
    assert counted.taken() == ({1}, {"pictures"}, len(segments) * 3)


def test_both_answers_of_a_pair_share_their_picture(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tokenizer, _ = vision_base(tmp_path / "m", "qwen3_vl", "float32")
    pictures = [row["images"][0] for row in json.loads(rows.read_text("utf-8"))[:2]]
    pairs = [
        {"prompt": "<image>Who?", "chosen": "A player.", "rejected": "Nobody.", "images": [picture]}
        for picture in pictures
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = DataConfig(train=(SourceConfig(path=str(path), media_dir=str(rows.parent)),), shuffle=False, batch_size=2)
    step = prepare(config, tokenizer=tokenizer, record=Preference, seed=0).train.next_step()
    assert len(step) == 4
    engine, _ = make_engine(base, micro_batch_tokens=200)
    slot = engine.bank.add(LoraConfig(rank=2), seed=0)
    engine.add(slot, DPOConfig().build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
    references = References(engine, None)
    counted = Counted(base, monkeypatch)
    references.prepare(step)
    assert counted.taken() == ({1}, {"pictures"}, 2)
    engine.forward_backward({slot: references.attach(step)})
    assert counted.taken() == ({1}, {"pictures"}, 2)
