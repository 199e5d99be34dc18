"""Rendering: masks token by token against transformers and TRL, refusals, lengths, kinds of records."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template

from lowrank.data.chat.rendered_record import Rendering
from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.errors import ConfigError, ModelError
from lowrank.records import Conversation, Message, Preference, Rated, Text
from lowrank.segments import CHOSEN, PLAIN, REJECTED, Segment
from tests.data.made_tokenizers import tokenizer_of, trl_template

STEADY = ["qwen2_5", "llama3", "phi3", "gemma", "deepseekv3", "cohere"]
"""Families that write earlier answers as they write the last one, and end them with a token."""
END = {
    "qwen2_5": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "phi3": "<|end|>",
    "gemma": "<end_of_turn>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
}
TURNS = ("What is 1 + 2?", "It is 3 🙂🚀", "And 你好?", "Hello,\n\nworld.", "Thanks", "法国的首都是巴黎。")


def chat(*contents: str, system: str | None = None) -> Conversation:
    messages = [Message("assistant" if place % 2 else "user", content) for place, content in enumerate(contents)]
    return Conversation(((Message("system", system),) if system is not None else ()) + tuple(messages))


def dicts(conversation: Conversation) -> list[dict[str, Any]]:
    return [{"role": message.role, "content": message.content} for message in conversation.messages]


def renderer_of(family: str, template: str | None = None, **settings: Any) -> Renderer:
    made = {key: settings.pop(key) for key in ("metaspace", "adds_bos") if key in settings}
    tokenizer = tokenizer_of(family, template or trl_template(family), **made)
    return Renderer(tokenizer, DataConfig(**settings))


def only(rendering: Rendering) -> Segment:
    assert rendering.problem is None
    assert len(rendering.segments) == 1
    return rendering.segments[0]


def learned(renderer: Renderer, segment: Segment) -> list[str]:
    return [text for text, weight in renderer.show(segment) if weight]


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


def test_thinking_of_earlier_answers_is_learned_where_the_template_would_drop_it() -> None:
    renderer = renderer_of("qwen3")
    thoughts = [f"<think>\nthought {number}\n</think>\n\nanswer {number}" for number in range(3)]
    rendering = renderer.render(chat("a", thoughts[0], "b", thoughts[1], "c", thoughts[2]))
    assert [learned(renderer, segment) for segment in rendering.segments] == [
        [thought + "<|im_end|>"] for thought in thoughts
    ]
    context = renderer.show(rendering.segments[2])[0][0]
    assert "thought" not in context  # the history as the template writes it, and as the model will see it
    assert "several samples" in renderer.notices[0]
    assert len(rendering.samples) == 3


def test_a_tool_loop_that_keeps_its_thinking_stays_one_sample() -> None:
    renderer = renderer_of("qwen3")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    messages = (
        Message("user", "Weather?"),
        Message("assistant", "<think>\nask\n</think>\n\n", (call,)),
        Message("tool", "sunny"),
        Message("assistant", "<think>\nsay\n</think>\n\nSunny."),
    )
    tools = ({"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}},)
    segment = only(renderer.render(Conversation(messages, tools)))
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert learned(renderer, segment) == [
        f"<think>\nask\n</think>\n\n{written}<|im_end|>",
        "<think>\nsay\n</think>\n\nSunny.<|im_end|>",
    ]
    assert '"weather"' in renderer.show(segment)[0][0]


def test_settings_reach_the_template() -> None:
    renderer = renderer_of("qwen3", chat_template_kwargs={"enable_thinking": False})
    segment = only(renderer.render(chat("a", "b")))
    assert learned(renderer, segment) == ["b<|im_end|>"]
    prompt = renderer.tokenizer.decode(renderer.prompt(chat("a")))
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    thinking = renderer.render(chat("a", "<think>\nhm\n</think>\n\nb"))
    assert "does not continue its generation prompt" in (thinking.problem or "")


def test_glm_ends_answers_with_the_next_speaker() -> None:
    renderer = renderer_of("glm4moe")
    segment = only(renderer.render(chat("a", "b", "c", "d")))
    assert learned(renderer, segment) == ["\n<think></think>\nb<|user|>", "\n<think></think>\nd<|user|>"]
    stops = renderer.tokenizer.convert_ids_to_tokens(sorted(renderer.stop_tokens))
    assert sorted(stops) == ["<|endoftext|>", "<|observation|>", "<|user|>"]
    assert "<|user|> or <|observation|> is added" in renderer.notices[0]


def test_a_template_without_any_end_gets_eos_and_a_sample_per_turn() -> None:
    template = "{% for m in messages %}{{ m.role + ':\n' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    renderer = renderer_of("plain", template)
    rendering = renderer.render(chat("a", "b", "c", "d"))
    assert [learned(renderer, segment) for segment in rendering.segments] == [["b<|endoftext|>"], ["d<|endoftext|>"]]


def test_a_prompt_whose_end_melts_into_the_answer_is_told() -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    renderer = renderer_of("plain", template)
    assert learned(renderer, only(renderer.render(chat("a", "b")))) == [" b<|endoftext|>"]
    assert "melt together" in renderer.notices[0]


def test_a_template_that_moves_the_system_prompt_makes_a_sample_per_turn() -> None:
    template = (  # as Mistral 7B Instruct v0.3 does: the system prompt stands before the last question
        "{{ bos_token }}{% set system = '' %}{% if messages[0].role == 'system' %}{% set system = messages[0].content "
        "%}{% set messages = messages[1:] %}{% endif %}{% set ns = namespace(last=0) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + (system + '\n\n' if system and loop.index0 == ns.last else '') + "
        "m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    renderer = renderer_of("mistral", template, metaspace=True)
    assert len(renderer.render(chat("a", "b", "c", "d")).segments) == 1
    rendering = renderer.render(chat("a", "b", "c", "d", system="be kind"))
    shown = [renderer.show(segment) for segment in rendering.segments]
    assert [[text.strip() for text, weight in pieces if weight] for pieces in shown] == [["b</s>"], ["d</s>"]]
    assert [pieces[0][0].count("be kind") for pieces in shown] == [1, 1]


def test_marks_that_leave_out_the_end_of_turn_are_stretched_over_it() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    renderer = renderer_of("qwen2_5", template)
    assert learned(renderer, only(renderer.render(chat("a", "b", "c", "d")))) == ["b<|im_end|>", "d<|im_end|>"]


def test_a_turn_that_history_keeps_in_part_is_learned_on_its_own() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}A: "
        "{% endgeneration %}{% generation %}{{ m.content if loop.last else m.content[:1] }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    renderer = renderer_of("qwen2_5", template)
    rendering = renderer.render(chat("a", "hello", "c", "world"))
    assert [learned(renderer, segment) for segment in rendering.segments] == [
        ["A: hello<|im_end|>"],
        ["A: world<|im_end|>"],
    ]


@pytest.mark.parametrize("thinking", ["", "<think>\n"])
@pytest.mark.parametrize("rewritten", ["user", "system"])
def test_a_template_that_rewrites_what_was_said_once_it_is_answered_is_refused(thinking: str, rewritten: str) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{{ '!' if m.role == 'ROLE' and "
        "messages[-1].role == 'assistant' else '' }}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\nTHINK' }}{% endif %}"
    ).replace("THINK", thinking.replace("\n", "\\n"))
    rendering = renderer_of("qwen3", template.replace("ROLE", rewritten)).render(chat("a", "hello", system="s"))
    assert rendering.segments == ()
    assert "does not continue its generation prompt" in (rendering.problem or "")


def test_an_end_of_two_tokens_is_learned_whole() -> None:
    template = (
        "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content }}<|end|><|return|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}"
    )
    renderer = renderer_of("gptoss", template)
    assert learned(renderer, only(renderer.render(chat("a", "b", "c", "d")))) == [
        "b<|end|><|return|>",
        "d<|end|><|return|>",
    ]


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


def test_truncation_keeps_the_prompt_and_counts() -> None:
    whole = only(renderer_of("llama3").render(chat("a question", TURNS[5] * 10)))
    prompt = int(np.flatnonzero(whole.weight_L)[0])
    renderer = renderer_of("llama3", max_length=prompt + 7)
    rendering = renderer.render(chat("a question", TURNS[5] * 10))
    assert only(rendering).token_L.tolist() == whole.token_L[: prompt + 7].tolist()
    assert rendering.truncated_tokens == len(whole) - prompt - 7
    tight = renderer_of("llama3", max_length=prompt).render(chat("a question", TURNS[5] * 10))
    assert tight.segments == ()
    assert "its prompt alone fills that" in (tight.problem or "")


def test_a_pair_needs_both_answers() -> None:
    record = Preference(chat("a"), Message("assistant", "good " * 30), Message("assistant", "bad"))
    lengths = [len(segment) for segment in renderer_of("llama3").render(record).segments]
    cut = renderer_of("llama3", max_length=lengths[0] - 5).render(record)
    assert [len(segment) for segment in cut.segments] == [lengths[0] - 5, lengths[1]]
    assert cut.truncated_tokens == 5
    assert renderer_of("llama3", max_length=4).render(record).segments == ()


@pytest.mark.parametrize(("policy", "refused"), [("drop", False), ("error", True)])
def test_too_long_rows_are_left_out_or_refused(policy: str, refused: bool) -> None:
    rendering = renderer_of("llama3", on_too_long=policy, max_length=20).render(chat("a", TURNS[5] * 10))
    assert rendering.segments == ()
    assert rendering.refused is refused
    assert "data.max_length is 20" in (rendering.problem or "")


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("record", [Text(TURNS[5] * 20), chat(TURNS[0], TURNS[5] * 10, TURNS[2], TURNS[3] * 9)])
def test_pieces_learn_every_learned_token_once(record: Any, adds_bos: bool) -> None:
    whole = only(renderer_of("llama3", adds_bos=adds_bos, max_length=10**6).render(record))
    for length in (2, 7, 50):
        rendering = renderer_of("llama3", adds_bos=adds_bos, max_length=length, on_too_long="split").render(record)
        pieces = rendering.segments
        assert all(len(piece) <= length and piece.weight_L[0] == 0 for piece in pieces)
        together = np.concatenate([piece.token_L[piece.weight_L > 0] for piece in pieces])
        assert together.tolist() == whole.token_L[whole.weight_L > 0].tolist()
        assert rendering.samples == tuple((piece,) for piece in pieces)
        assert {piece.role for piece in pieces} == {PLAIN}


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
