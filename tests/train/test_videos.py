"""Training with videos: many jobs in one stream, against each document alone in transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.media.torchvision import torchvision_problem
from tests.media_oracle import alone_loss
from tests.media_rows import packed_base, segments_in
from tests.peft_oracle import peft_twin
from tests.picture_rows import write_picture_rows
from tests.tiny_models import make_engine, pretend_learned
from tests.tiny_video_models import WATCHING, make_watching, save_watching_folder
from tests.video_rows import write_video_rows

pytestmark = pytest.mark.skipif(torchvision_problem() is not None, reason=str(torchvision_problem()))
EQUAL_LENGTHS = {"llava_onevision"}
"""Their processors refuse videos of different numbers of frames in one document."""
families = pytest.mark.parametrize("family", WATCHING)


def watching(path: Path, family: str, *kinds: str) -> Any:
    """(the base, its tokenizer)."""
    return packed_base(save_watching_folder(path, family, torch.float64), "float64", kinds or ("video",))


def compare_with_peft(family: str, base: Any, work: Any) -> None:
    engine, slots = make_engine(base, LoraConfig(rank=2), LoraConfig(rank=2), micro_batch_tokens=400)
    for slot in slots:
        pretend_learned(engine, slot, seed=slot)
    forwarded = engine.forward_backward(dict(zip(slots, work)))
    for slot, segments in zip(slots, work):
        ours = engine.bank.parameters(slot)
        targets = sorted({name.partition(".lora_")[0] for name in ours})
        twin, theirs = peft_twin(
            make_watching(family, torch.float64), ours, r=2, lora_alpha=4,
            target_modules="|".join(targets).replace(".", r"\."),
        )  # fmt: skip
        loss = alone_loss(twin, base, segments)
        loss.backward()
        assert forwarded[slot].loss == pytest.approx(loss.item(), abs=1e-9)
        for name, parameter in ours.items():
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-9)


@families
def test_jobs_learn_what_peft_learns_from_each_document_alone(family: str, tmp_path: Path) -> None:
    base, tokenizer = watching(tmp_path / "m", family)
    one, *others, three, four = segments_in(tokenizer, write_video_rows(tmp_path))
    assert len(others) == (family not in EQUAL_LENGTHS)
    compare_with_peft(family, base, [[one, three], [*others, four]])


@pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=pytest.mark.slow) if each == "qwen2_5_omni_thinker" else each for each in WATCHING],
)
def test_pictures_and_videos_in_one_document(family: str, tmp_path: Path) -> None:
    base, tokenizer = watching(tmp_path / "m", family, "image", "video")
    write_picture_rows(tmp_path)
    videos = write_video_rows(tmp_path)
    row = {
        "messages": [
            {"role": "user", "content": "<image>Is it in <video> or<video>?<image>"},
            {"role": "assistant", "content": "The second."},
        ],
        "images": ["pictures/1.jpg", "pictures/0.jpg"],
        "videos": [f"videos/{int(family in EQUAL_LENGTHS)}.gif", "videos/1.gif"],
    }
    both = tmp_path / "both.json"
    both.write_text(json.dumps([row]), encoding="utf-8")
    mixed, *rest = segments_in(tokenizer, both, tmp_path / "mllm.json", videos)
    assert mixed.media is not None
    assert [each.kind for each in mixed.media.items] == ["image", "video", "video", "image"]
    compare_with_peft(family, base, [[mixed, rest[1]], [rest[-1], mixed]])
