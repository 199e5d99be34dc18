"""Rendering: what of each kind of record is learned, which rows are refused, and that text stays as it stands."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.errors import ConfigError, ModelError
from lowrank.records import Conversation, Message, Preference, Rated, Text
from lowrank.segments import CHOSEN, REJECTED
from tests.data.made_tokenizers import tokenizer_of, trl_template
from tests.data.renderers import END, STEADY, TURNS, chat, learned, only, renderer_of


@pytest.mark.parametrize(
    ("family", "metaspace"), [*((name, False) for name in STEADY), ("phi3", True), ("gemma", True)]
)
def test_what_is_learned_is_the_answers_and_their_ends(family: str, metaspace: bool) -> None:
    renderer = renderer_of(family, metaspace=metaspace)
    segment = only(renderer.render(chat(*TURNS)))
    answers = [text.strip() for text in learned(renderer, segment)]  # sentencepiece decodes a space before a word
    assert answers == [answer + END[family] for answer in TURNS[1::2]]
    assert segment.weight_L[0] == 0
    assert segment.weight_L[-1] == 1
    assert segment.token_L[-1] in renderer.stop_tokens


def test_settings_reach_the_template() -> None:
    renderer = renderer_of("qwen3", chat_template_kwargs={"enable_thinking": False})
    segment = only(renderer.render(chat("a", "b")))
    assert learned(renderer, segment) == ["b<|im_end|>"]
    prompt = renderer.tokenizer.decode(renderer.prompt(chat("a")))
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    thinking = renderer.render(chat("a", "<think>\nhm\n</think>\n\nb"))
    assert "does not continue its generation prompt" in (thinking.problem or "")


@pytest.mark.parametrize(
    ("family", "conversation", "problem"),
    [
        ("gemma", chat("a", "b", system="s"), "System role not supported"),
        ("gemma", chat("a", "b", "c").messages[1:], "begins with an answer"),
        ("gemma", (Message("user", "a"), Message("user", "b"), Message("assistant", "c")), "must alternate"),
        ("deepseek_r1_distill", chat("a", "<think>why</think>b"), "leaves out part of the answer in turn 2"),
        ("llama3", Conversation(chat("a", "b").messages, ({"type": "function"},)), "chat template ignores"),
        ("llama3", chat("a"), "no turn of the assistant"),
        ("llama3", chat("a", " \n"), "the answer is empty"),
        ("phi3", (Message("user", "a"), Message("tool", "42"), Message("assistant", "b")), "leaves out turn 2 (tool)"),
        ("llama3", (Message("user", "a"), Message("assistant", "b", trained=False)), "weight 0"),
    ],
)
def test_rows_are_refused_with_the_reason(family: str, conversation: Any, problem: str) -> None:
    if isinstance(conversation, tuple):
        conversation = Conversation(conversation)
    tokens = "deepseekv3" if family == "deepseek_r1_distill" else family
    rendering = renderer_of(tokens, trl_template(family)).render(conversation)
    assert rendering.segments == ()
    assert problem in (rendering.problem or "")


def test_a_system_prompt_is_never_altered_and_the_default_only_fills_in() -> None:
    renderer = renderer_of("qwen2_5", default_system="default one")
    without = renderer.tokenizer.decode(only(renderer.render(chat("a", "b"))).token_L)
    assert without.startswith("<|im_start|>system\ndefault one<|im_end|>")
    given = renderer.tokenizer.decode(only(renderer.render(chat("a", "b", system="mine"))).token_L)
    assert given.startswith("<|im_start|>system\nmine<|im_end|>")
    assert "default one" not in given
    with pytest.raises(ConfigError, match=r"default_system: .*System role not supported"):
        renderer_of("gemma", default_system="s").render(chat("a", "b"))


def test_which_turns_are_learned() -> None:
    messages = (
        Message("user", "a"), Message("assistant", "one", trained=False), Message("user", "b"),
        Message("assistant", "two"), Message("user", "c"), Message("assistant", "three"), Message("user", "d"),
    )  # fmt: skip
    conversation = Conversation(messages)
    end = "<|eot_id|>"
    every = renderer_of("llama3")
    assert learned(every, only(every.render(conversation))) == ["two" + end, "three" + end]
    last = renderer_of("llama3", mask_history=True)
    assert learned(last, only(last.render(conversation))) == ["three" + end]
    prompts = renderer_of("llama3", train_on_prompt=True)
    context = [text for text, weight in prompts.show(only(prompts.render(conversation))) if not weight]
    assert context == ["<|begin_of_text|>", "one" + end]
    with pytest.raises(ConfigError, match="exclude each other"):
        renderer_of("llama3", mask_history=True, train_on_prompt=True)


def test_a_prompt_is_learned_once_when_a_conversation_becomes_several_samples() -> None:
    renderer = renderer_of("qwen3", train_on_prompt=True)
    first, second = renderer.render(chat("first question", "b", "second question", "d")).segments
    assert "first question" in "".join(learned(renderer, first))
    assert "first question" not in "".join(learned(renderer, second))
    assert "second question" in "".join(learned(renderer, second))


@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos_is_never_doubled(adds_bos: bool) -> None:
    renderer = renderer_of("llama3", adds_bos=adds_bos)
    bos = renderer.tokenizer.bos_token_id
    for record in (chat(*TURNS), Text("Paris"), Text("<|begin_of_text|>Paris")):
        tokens = only(renderer.render(record)).token_L.tolist()
        assert tokens.count(bos) == (1 if adds_bos or record != Text("Paris") else 0)
    assert renderer.prompt(chat("a")).tolist().count(bos) == 1


def test_plain_text_is_learned_to_its_end() -> None:
    renderer = Renderer(tokenizer_of("llama3"), DataConfig())  # needs no chat template
    segment = only(renderer.render(Text("Paris is the capital.")))
    assert renderer.show(segment) == [("<|begin_of_text|>", 0.0), ("Paris is the capital.<|eot_id|>", 1.0)]
    assert renderer.render(Text(" \n")).problem == "the text is empty"
    assert only(renderer.render(Text("Paris<|eot_id|>"))).token_L.tolist().count(renderer.tokenizer.eos_token_id) == 1
    assert renderer.stop_tokens == {renderer.tokenizer.eos_token_id}
    plain = Renderer(tokenizer_of("plain"), DataConfig())
    assert only(plain.render(Text("ab"))).weight_L[0] == 0


def test_preferences_are_pairs_that_share_their_prompt() -> None:
    renderer = renderer_of("llama3")
    record = Preference(chat("a", "b", "c"), Message("assistant", "good"), Message("assistant", "bad"))
    rendering = renderer.render(record)
    chosen, rejected = rendering.segments
    assert [(segment.pair, segment.role) for segment in rendering.segments] == [(0, CHOSEN), (0, REJECTED)]
    assert learned(renderer, chosen) == ["good<|eot_id|>"]
    assert learned(renderer, rejected) == ["bad<|eot_id|>"]
    assert renderer.show(chosen)[0] == renderer.show(rejected)[0]
    assert rendering.samples == (rendering.segments,)


@pytest.mark.parametrize(("desirable", "role"), [(True, CHOSEN), (False, REJECTED)])
def test_rated_answers_carry_their_rating(desirable: bool, role: int) -> None:
    renderer = renderer_of("llama3")
    segment = only(renderer.render(Rated(chat("a", "b", "c", "d"), desirable)))
    assert (segment.role, segment.pair) == (role, -1)
    assert learned(renderer, segment) == ["d<|eot_id|>"]


def test_many_are_as_one_by_one() -> None:
    renderer = renderer_of("qwen3")
    records = [chat("a", "b"), chat("a", "b", "c", "d"), chat("a"), Text("some text"), chat("", "")] * 250
    assert len(records) > 1000
    many = list(renderer.render_many(iter(records)))
    for place, record in enumerate(records[:5]):
        one = renderer.render(record)
        for rendering in many[place::5]:
            assert rendering.problem == one.problem
            assert len(rendering.segments) == len(one.segments)
            for got, expected in zip(rendering.segments, one.segments):
                assert got.token_L.tolist() == expected.token_L.tolist()
                assert got.weight_L.tolist() == expected.weight_L.tolist()


@pytest.mark.parametrize("family", STEADY)
def test_any_content_is_learned_as_it_stands(family: str) -> None:
    draw = random.Random(0)
    pieces = ["word", " ", "\n", "你", "🙂", "e\u0301", "<|im_end|>", "</s>", "<", "|>", "Assistant:", "\t", "{{ x }}"]
    renderer = renderer_of(family)
    for _ in range(40):
        contents = ["x" + "".join(draw.choices(pieces, k=draw.randint(0, 8))) + "y" for _ in range(6)]
        segment = only(renderer.render(chat(*contents)))
        assert learned(renderer, segment) == [
            renderer.tokenizer.decode(renderer.tokenizer(content, add_special_tokens=False)["input_ids"]) + END[family]
            for content in contents[1::2]
        ]


def test_the_prompt_is_what_the_answer_was_learned_after() -> None:
    for family in [*STEADY, "qwen3", "glm4moe", "gptoss"]:
        renderer = renderer_of(family)
        segment = only(renderer.render(chat("a", "b")))
        prompt = renderer.prompt(chat("a"))
        assert prompt.dtype == np.int64
        context = segment.token_L[segment.weight_L == 0].tolist()
        if family == "deepseekv3":  # its template prompts for thinking, but writes answers without
            assert prompt.tolist()[: len(context)] == context
            assert "ends in '<think>\\n', which finished answers lack" in renderer.notices[0]
        else:
            assert prompt.tolist() == context
            assert not any("prompt" in notice for notice in renderer.notices)


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"(?s)slow tokenizer.*tokenizer\.json"):
        Renderer(Slow(), DataConfig())


@pytest.mark.parametrize("family", ["qwen2_5", "llama3", "phi3"])
@pytest.mark.parametrize("name", ["alpaca_zh_demo.json", "alpaca_en_demo.json"])
def test_real_rows(shared_data: Path, family: str, name: str) -> None:
    rows = json.loads((shared_data / name).read_text(encoding="utf-8"))[:200]
    rows = [row for row in rows if row["output"].strip()]
    renderer = renderer_of(family, max_length=10**6)
    conversations = [chat(row["instruction"] + row["input"], row["output"].strip()) for row in rows]
    for row, rendering in zip(rows, renderer.render_many(conversations)):
        text = renderer.tokenizer.decode(renderer.tokenizer(row["output"].strip())["input_ids"])
        assert learned(renderer, only(rendering)) == [
            text.removeprefix("<|begin_of_text|>").removeprefix("<s>") + END[family]
        ]
