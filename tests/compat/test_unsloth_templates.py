"""Unsloth's functions around conversations."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from lowrank.compat.unsloth.chat_templates import (
    apply_chat_template,
    get_chat_template,
    standardize_data_formats,
    standardize_sharegpt,
    to_sharegpt,
)
from lowrank.compat.unsloth.responses import _learned, parts_of, train_on_responses_only
from lowrank.compat.unsloth.template_names import KINDS
from lowrank.data import templates
from lowrank.errors import ConfigError, DataError, ModelError
from tests.compat.test_unsloth import tokenizer

TURNS = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
SHAREGPT = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]


def with_tokens(*names: str) -> Any:
    own = tokenizer()
    own.add_special_tokens({"additional_special_tokens": list(names)})
    own.bos_token = "<|endoftext|>" if own.bos_token is None else own.bos_token
    return own


ALL_TOKENS = ("<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>",
              "<|assistant|>", "<|system|>", "<|end|>", "<|im_sep|>", "<|end_of_turn|>")  # fmt: skip


def test_every_name_of_theirs_is_a_template_or_refused_in_words() -> None:
    refused = {}
    for name in KINDS:
        own = with_tokens(*ALL_TOKENS)
        own.chat_template = None
        try:
            text = get_chat_template(own, name).apply_chat_template(TURNS, tokenize=False)
        except ModelError as error:
            refused[name] = str(error)
            continue
        assert text.index("one") < text.index("two")
        assert own.eos_token in text[text.index("two") :], name
    assert all("none is built in" in why for why in refused.values())
    assert refused.keys() == {"gemma-4", "gemma4", "gemma-4-thinking", "gemma4-thinking", "gpt-oss", "gptoss"}


def test_the_tokenizers_own_template_comes_first_where_it_speaks_it() -> None:
    own = with_tokens(*ALL_TOKENS)
    own.chat_template = "{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n{% endfor %}"
    assert "<|turn>user\none" in get_chat_template(own, "gemma-4", map_eos_token=False).apply_chat_template(
        TURNS, tokenize=False
    )


def test_a_name_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"no template 'chatmi'.*chatml"):
        get_chat_template(tokenizer(), "chatmi")
    with pytest.raises(ModelError, match="special tokens"):
        get_chat_template(tokenizer(), "gemma-2")


def test_mapping_reads_both_ways_and_a_system_prompt_is_put_before() -> None:
    mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    own = get_chat_template(tokenizer(), "chatml", mapping=mapping, system_message="be 'brief'")
    texts = {own.apply_chat_template(each, tokenize=False) for each in (TURNS, SHAREGPT)}
    assert texts == {
        "<|im_start|>system\nbe 'brief'<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n"
    }
    system = [{"role": "system", "content": "own"}, *TURNS]
    assert own.apply_chat_template(system, tokenize=False).count("system") == 1


def test_a_template_of_ones_own_with_its_end() -> None:
    text = "{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}"
    own = get_chat_template(tokenizer(), (text, "eos_token"))
    before = tokenizer().eos_token
    assert own.apply_chat_template(TURNS, tokenize=False) == f"[one]{before}[two]{before}"
    renamed = get_chat_template(tokenizer(), (text, "<stop>"))
    assert renamed.eos_token == "<stop>"
    assert renamed.eos_token_id == tokenizer().eos_token_id, "the same row of the embedding"
    assert renamed("[one]<stop>")["input_ids"][-1] == renamed.eos_token_id
    assert renamed.decode([renamed.eos_token_id]) == "<stop>"


def test_chatml_without_its_tokens() -> None:
    own = get_chat_template(tokenizer(), (templates.source_of("chatml"), "eos_token"), map_eos_token=False)
    names = {"<|im_start|>": "<a>", "<|im_end|>": "<b>"}
    from lowrank.compat.unsloth.chat_templates import _rename

    _rename(own, names)
    assert "<|im_end|>" not in own.get_vocab()
    end = own.eos_token_id
    get_chat_template(own, "chatml")
    assert (own.eos_token, own.eos_token_id) == ("<|im_end|>", end)
    ids = own.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    assert ids.count(end) == 2


def test_contents_in_parts_are_text() -> None:
    own = get_chat_template(tokenizer(), "chatml")
    parts = [{"role": "user", "content": [{"type": "text", "text": "on"}, {"type": "text", "text": "e"}]}, TURNS[1]]
    assert own.apply_chat_template(parts, tokenize=False) == own.apply_chat_template(TURNS, tokenize=False)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("chatml", ("<|im_start|>user\n", "<|im_start|>assistant\n")),
        ("qwen-2.5", ("<|im_start|>user\n", "<|im_start|>assistant\n")),
        (
            "llama-3",
            ("<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ),
        ("gemma", ("<start_of_turn>user\n", "<start_of_turn>model\n")),
        ("phi-4", ("<|im_start|>user<|im_sep|>", "<|im_start|>assistant<|im_sep|>")),
        ("alpaca", ("### Instruction:\n", "### Response:\n")),
    ],
)
def test_parts_are_read_from_the_template(name: str, parts: tuple[str, str]) -> None:
    assert parts_of(get_chat_template(with_tokens(*ALL_TOKENS), name)) == parts


def test_a_template_that_tells_no_turns_apart() -> None:
    own = tokenizer()
    own.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="give instruction_part"):
        parts_of(own)


def test_labels_of_answers_alone() -> None:
    own = get_chat_template(tokenizer(), "chatml")
    turns = [*TURNS, {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]
    ids = own.apply_chat_template(turns, tokenize=True, return_dict=False)

    def learned(ids: list[int], last_only: bool = False) -> str:
        return own.decode([each for each, yes in zip(ids, _learned(ids, own, parts_of(own), last_only)) if yes])

    assert learned(ids) == "two<|im_end|>\nfour<|im_end|>\n"
    assert learned(ids, last_only=True) == "four<|im_end|>\n"
    function = train_on_responses_only(None, tokenizer=own, return_function=True)
    assert own.decode([each for each in function({"input_ids": [ids]})["labels"][0] if each != -100]) == learned(ids)


def test_a_row_in_other_pieces_is_read_too() -> None:
    """Cut rows need not be what their text would be tokenized to."""
    own = get_chat_template(tokenizer(), "chatml")
    ids = own.apply_chat_template([TURNS[0], {"role": "assistant", "content": ""}], tokenize=True, return_dict=False)
    cut = [*ids[: ids.index(own.eos_token_id, 5)], *(own.convert_tokens_to_ids(each) for each in "number")]
    assert own(own.decode(cut), add_special_tokens=False)["input_ids"] != cut
    seen = _learned(cut, own, ("<|im_start|>user\n", "<|im_start|>assistant\n"), False)
    text = own.decode([each for each, yes in zip(cut, seen) if yes])
    assert text == ("number" if "assistant\n" in own.decode(cut) else "")


def test_turns_of_any_two_keys() -> None:
    rows = Dataset.from_list([{"conversations": SHAREGPT}])
    assert standardize_sharegpt(rows)[0]["conversations"] == TURNS
    odd = [{"who": "input", "says": "one"}, {"who": "output", "says": "two"}, {"who": "input", "says": "three"}]
    assert standardize_data_formats(Dataset.from_list([{"conversations": odd}]))[0]["conversations"][:2] == TURNS
    plain = Dataset.from_list([{"text": "a"}])
    assert standardize_data_formats(plain) is plain
    with pytest.raises(DataError, match="'dog'"):
        standardize_sharegpt(Dataset.from_list([{"conversations": [{"from": "dog", "value": "one"}]}]))


def test_columns_become_conversations() -> None:
    rows = Dataset.from_list([{"instruction": f"q{i}", "input": "" if i else "more", "output": i} for i in range(5)])
    merged = "{instruction}[[\nYour input is:\n{input}]]"
    one = to_sharegpt(rows, merged_prompt=merged)
    assert one[0]["conversations"][0]["value"] == "q0\nYour input is:\nmore"
    assert one[1]["conversations"] == [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "1"}]
    three = to_sharegpt(rows, merged_prompt=merged, conversation_extension=3)
    assert [len(each) for each in three["conversations"]] == [6] * 5
    assert three[2]["conversations"][:2] == one[2]["conversations"]
    drawn = {turn["value"] for each in three["conversations"] for turn in each[2::2]}
    assert len(drawn) == 5, "the others are the same rows, in another order"
    with pytest.raises(ConfigError, match="no column inputs"):
        to_sharegpt(rows, merged_prompt="{inputs}")


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_template_by_example(rounds: int) -> None:
    example = "Below are tasks.\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}"
    if rounds == 2:
        example = "Below are tasks." + 2 * "\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}<|im_end|>"
    own = tokenizer()
    rows = apply_chat_template(Dataset.from_list([{"conversations": TURNS + TURNS}]), own, example)
    once = "\n\n### Instruction:\none\n\n### Response:\ntwo<|im_end|>"
    assert own.eos_token == "<|im_end|>"
    assert rows["text"][0] == "Below are tasks." + once + once
    with pytest.raises(ConfigError, match="INPUT"):
        apply_chat_template(rows, own, "{OUTPUT}")
    with pytest.raises(ConfigError, match="no place"):
        apply_chat_template(rows, own, example, default_system_message="hello")
