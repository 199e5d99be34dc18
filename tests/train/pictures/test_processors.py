"""Ids and labels beside those that other programs' processors and collators make of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lowrank.adapters.variants.lora import LoraConfig
from tests.media_rows import segments_in, write_conversations
from tests.peft_oracle import types_of
from tests.tiny_models import make_engine
from tests.tiny_vision_models import make_vision_model
from tests.vision_bases import segments_of, vision_base


@pytest.mark.slow  # importing TRL takes most of its ten seconds
def test_ids_and_labels_are_those_of_trls_collator(tmp_path: Path, rows: Path) -> None:
    """But for the placeholders: TRL too learns the answers alone where the template marks them."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    base, tokenizer, _ = vision_base(tmp_path, "qwen2_5_vl")
    tokenizer.chat_template = MARKED
    processor = base.media_encoder.processor.own
    processor.chat_template = MARKED
    collator = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    for segment, row in zip(segments_of(rows, tokenizer), json.loads(rows.read_text("utf-8"))):
        turns = [{"role": turn["role"], "content": in_parts(turn["content"])} for turn in row["messages"]]
        images = [Image.open(rows.parent / name) for name in row["images"]]
        theirs = collator([{"messages": turns, "images": images}])
        length = len(segment)
        assert theirs["input_ids"][0, :length].tolist() == segment.token_L.tolist()
        learned = (theirs["labels"][0] != -100).tolist()
        assert learned[:length] == (segment.weight_L > 0).tolist()
        assert not any(learned[length:])


def test_a_prompt_is_what_paligemmas_processor_says(tmp_path: Path, rows: Path) -> None:
    """Ids, types and labels that it makes of prompt and suffix, and the loss that transformers makes of these."""
    base, tokenizer, _ = vision_base(tmp_path / "m", "paligemma")
    tokenizer.add_bos_token = True
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    processor = base.media_encoder.processor
    processor.__dict__.pop("own")  # made anew, it lets the tokenizer go on as it was
    assert processor.own.tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    with Image.open(rows.parent / json.loads(rows.read_text("utf-8"))[1]["images"][0]) as picture:
        picture.save(tmp_path / "it.png")
    turns = [("<image>answer en What is it?", "a cat"), ("What differs <image>here<image>?", "nothing <loc0000>")]
    talks = [(["it.png"] * prompt.count("<image>"), [(prompt, suffix)]) for prompt, suffix in turns]
    segments = segments_in(tokenizer, write_conversations(tmp_path / "rows.json", "images", talks))
    tokenizer.add_bos_token = False  # as its own class does, for good
    engine, (slot,) = make_engine(base, LoraConfig(rank=2))
    model = make_vision_model("paligemma", torch.float64)
    for segment, (prompt, suffix) in zip(segments, turns):
        images = [Image.open(tmp_path / "it.png")] * prompt.count("<image>")
        text = "<image>" * len(images) + prompt.replace("<image>", "")
        theirs = processor.own(text=[text], images=[images], suffix=[suffix], return_tensors="pt")
        assert theirs["input_ids"][0].tolist() == segment.token_L.tolist()
        assert theirs["token_type_ids"].tolist() == types_of(segment).tolist()
        assert (theirs["labels"][0] != -100).tolist() == (segment.weight_L > 0).tolist()
        theirs["pixel_values"] = theirs["pixel_values"].to(base.dtype)
        assert engine.evaluate({slot: [segment]})[slot].loss == pytest.approx(model(**theirs).loss.item(), abs=1e-5)


def in_parts(text: str) -> list[dict[str, Any]]:
    first, *others = text.split("<image>")
    parts = [{"type": "text", "text": first}] if first else []
    for other in others:
        parts += [{"type": "image"}, *([{"type": "text", "text": other}] if other else [])]
    return parts


MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{{ message['content'][0]['text'] }}{% endif %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% elif message['content'] is string %}{{ message['content'] + '<|im_end|>\n' }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen's, with the marks that say what the assistant wrote."""
