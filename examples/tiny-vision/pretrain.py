"""Teach a small LLaVA to see, from nothing, and write it as a checkpoint of transformers.

    python examples/tiny-vision/pretrain.py OUT_FOLDER [STEPS]

A CLIP tower and a Llama, 1.1 million parameters together, on pictures drawn as they are needed (shapes.py). 8,000
steps of 32 pictures take half an hour of one core.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from shapes import COLORS, SIDE, described, draw_groups, picture
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

PATCH = 12
END_OF_TEXT, START, END, IMAGE = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"
BATCH = 32
MEAN, DEVIATION = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{%- set text = message['content'] -%}
{%- else -%}
{%- set text = namespace(of='') -%}
{%- for part in message['content'] -%}
{%- set text.of = text.of + ('<image>' if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- set text = text.of -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ text }}<|im_end|>{% endgeneration %}
{% else -%}
{{ text }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: the words of shapes.py, and bytes for all else."""
    rng = random.Random(0)
    texts = [" ".join(described(draw_groups(rng), rng)) for _ in range(4000)]
    texts += [f"{en}, {number}，{zh} user assistant system" for number in range(10) for en, zh, _ in COLORS] * 20
    texts += ["Color and count of the 的颜色和数量？ how many which 多少 什么"] * 100
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"[\u4e00-\u9fff]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(each, special=True, normalized=False) for each in (END_OF_TEXT, START, END, IMAGE)]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[START, IMAGE],
        extra_special_tokens={"image_token": IMAGE},
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Any picture becomes 60 x 60 pixels: 25 tokens of 12 x 12."""
    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=MEAN, image_std=DEVIATION
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A LLaVA of 1.1 million parameters."""
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH, projection_dim=96,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1, image_seq_length=(SIDE // PATCH) ** 2, tie_word_embeddings=True,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Endless: ids, labels (answers alone) and pixels of BATCH conversations, padded on the right."""
    rng, count = random.Random(seed), (SIDE // PATCH) ** 2
    while True:
        rows, pixels = [], []
        for _ in range(BATCH):
            groups = draw_groups(rng)
            pixels.append(np.asarray(picture(groups, rng), dtype=np.float32))
            question, answer = described(groups, rng)
            prompt = f"{START}user\n{IMAGE * count}{question}{END}\n{START}assistant\n"
            given, answered = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer + END))
            rows.append((given + answered, [-100] * len(given) + answered))
        length = max(len(ids) for ids, _ in rows)
        filler = tokenizer.pad_token_id
        scaled = (np.stack(pixels).transpose(0, 3, 1, 2) / 255 - MEAN[0]) / DEVIATION[0]
        yield {
            "input_ids": torch.tensor([ids + [filler] * (length - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
            "pixel_values": torch.tensor(scaled, dtype=torch.float32),
        }


def train(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """AdamW, a cosine schedule; prints loss and the share of answers' tokens that are the likeliest, as it goes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.05)
    began = time.monotonic()
    for step, batch in zip(range(1, steps + 1), batches(tokenizer, 0)):
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            counted = labels[:, 1:] != -100
            right = (logits.argmax(-1) == labels[:, 1:])[counted].float().mean().item()
            seconds = time.monotonic() - began
            print(f"step {step}/{steps}  loss {loss.item():.4f}  tokens right {right:.3f}  {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    out, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8000
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{len(tokenizer)} tokens, {sum(each.numel() for each in model.parameters()):,} parameters", flush=True)
    train(model, tokenizer, steps)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(out)
    make_processor(tokenizer).save_pretrained(out)
    print(f"{sum(file.stat().st_size for file in out.iterdir()) / 1e6:.1f} MB in {out}")
