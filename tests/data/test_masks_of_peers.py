"""Tokens and masks beside those of transformers and TRL."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template

from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from tests.data.made_tokenizers import tokenizer_of, trl_template
from tests.data.renderers import STEADY, TURNS, chat, dicts, only, renderer_of


@pytest.mark.parametrize("family", STEADY)
def test_tokens_are_those_of_apply_chat_template(family: str) -> None:
    renderer = renderer_of(family)
    segment = only(renderer.render(chat(*TURNS)))
    expected = renderer.tokenizer.apply_chat_template(dicts(chat(*TURNS)))["input_ids"]
    assert segment.token_L.tolist() == expected[: len(segment)]
    assert not renderer.tokenizer.decode(expected[len(segment) :]).strip("\n").replace("<|endoftext|>", "")


@pytest.mark.parametrize(
    ("family", "metaspace"),
    [*((name, False) for name in [*STEADY, "qwen3", "glm4moe"]), ("phi3", True), ("gemma", True)],
)
def test_marked_templates_give_the_mask_of_transformers(family: str, metaspace: bool) -> None:
    original = tokenizer_of(family, trl_template(family))
    renderer = renderer_of(family, get_training_chat_template(original), metaspace=metaspace)
    segment = only(renderer.render(chat(*TURNS)))
    expected = renderer.tokenizer.apply_chat_template(dicts(chat(*TURNS)), return_assistant_tokens_mask=True)
    assert segment.token_L.tolist() == expected["input_ids"][: len(segment)]
    assert segment.weight_L.tolist() == expected["assistant_masks"][: len(segment)]
    assert not any(expected["assistant_masks"][len(segment) :])


@pytest.mark.parametrize("family", STEADY)
def test_found_masks_differ_from_trl_only_in_white_space_and_headers(family: str) -> None:
    renderer = renderer_of(family)
    template = get_training_chat_template(renderer.tokenizer)
    theirs = renderer.tokenizer.apply_chat_template(
        dicts(chat(*TURNS)), chat_template=template, return_assistant_tokens_mask=True
    )
    segment = only(renderer.render(chat(*TURNS)))
    tokens, mask = np.array(theirs["input_ids"]), np.array(theirs["assistant_masks"])
    assert segment.token_L.tolist() == tokens[: len(segment)].tolist()
    ours = np.zeros(len(tokens))
    ours[: len(segment)] = segment.weight_L
    assert not (ours > mask).any()
    more = renderer.tokenizer.decode(tokens[mask > ours])
    assert not more.replace("<|endoftext|>", "").replace("<｜Assistant｜>", "").strip()


@pytest.mark.filterwarnings("ignore")  # of TRL and transformers among themselves
def test_trl_trains_on_the_same_tokens(tmp_path: Path) -> None:
    renderer = renderer_of("llama3")
    config = transformers.LlamaConfig(
        vocab_size=len(renderer.tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    arguments = SFTConfig(
        str(tmp_path), assistant_only_loss=True, pad_token="<|end_of_text|>", report_to=[], use_cpu=True, bf16=False
    )
    trainer = SFTTrainer(
        transformers.LlamaForCausalLM(config),
        arguments,
        train_dataset=Dataset.from_list([{"messages": dicts(chat(*TURNS[:count]))} for count in (2, 4, 6)]),
        processing_class=renderer.tokenizer,
    )
    for row, count in zip(trainer.train_dataset, (2, 4, 6)):
        batch = trainer.data_collator([row])
        segment = only(
            Renderer(tokenizer_of("llama3", trl_template("llama3")), DataConfig()).render(chat(*TURNS[:count]))
        )
        assert batch["input_ids"][0].tolist() == segment.token_L.tolist()
        assert (batch["labels"][0] != -100).tolist() == segment.weight_L.astype(bool).tolist()
    assert torch.is_tensor(batch["labels"])
