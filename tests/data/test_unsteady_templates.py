"""What is learned where a template drops thoughts, has no end of turn, or writes earlier turns otherwise."""

from __future__ import annotations

import pytest

from lowrank.records import Conversation, Message
from tests.data.renderers import chat, learned, only, renderer_of


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
