"""OpenAI's own client against a real server: it finds what it knows, and the answers are those of `lowrank chat`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from lowrank.generate.request import GenerationConfig
from lowrank.pipelines.inference import open_inference_model
from lowrank.records import Conversation, Message
from tests.serve.running import Running, open_world, random_adapter, serving

QUESTIONS = ["What is the capital of France?", "Name a color.", "2 + 3 =", "Write a word that begins with b."]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(open_world()) as running:
        yield running


def messages_of(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


def expected(server: Running, served: str, question: str, tokens: int = 24) -> str:
    """What `InferenceModel.answer` says, of a world of its own: the server's model is in use by its thread."""
    world = open_world()
    conversation = Conversation((Message("user", question),))
    return world.answer([(served, conversation)], GenerationConfig(max_new_tokens=tokens))[0]


def test_models_are_the_base_and_each_adapter(server: Running) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["base", "one", "two"]
    assert client.models.retrieve("two").id == "two"


def test_greedy_answers_are_those_of_chat_whole_streamed_and_side_by_side(server: Running) -> None:
    client = server.client()
    cases = [(served, question) for served in ("base", "one", "two") for question in QUESTIONS]

    def whole(case: tuple[str, str]) -> str:
        reply = client.chat.completions.create(
            model=case[0], messages=messages_of(case[1]), temperature=0, max_completion_tokens=24
        )
        assert reply.usage is not None
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
        assert reply.model == case[0]
        return reply.choices[0].message.content or ""

    def streamed(case: tuple[str, str]) -> str:
        stream = client.chat.completions.create(
            model=case[0],
            messages=messages_of(case[1]),
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage is not None
        texts = sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks)
        assert texts <= chunks[-1].usage.completion_tokens <= 24
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    with ThreadPoolExecutor(24) as pool:
        all_whole, all_streamed = pool.map(whole, cases), pool.map(streamed, cases)
        answers, streams = list(all_whole), list(all_streamed)
    world = open_world()
    right = world.answer(
        [(served, Conversation((Message("user", question),))) for served, question in cases],
        GenerationConfig(max_new_tokens=24),
    )
    assert answers == right == streams
    assert len(set(answers)) > 6, "the adapters say different things"
    assert server.settles()


def test_completions_take_texts_and_tokens(server: Running) -> None:
    client = server.client()
    tokens = server.trained.base.tokenizer("The sky is")["input_ids"]
    one = client.completions.create(model="one", prompt="The sky is", temperature=0, max_tokens=8)
    same = client.completions.create(model="one", prompt=[tokens, tokens], temperature=0, max_tokens=8, logprobs=2)
    assert [choice.text for choice in same.choices] == [one.choices[0].text] * 2
    assert (same.usage.prompt_tokens, same.usage.completion_tokens) == (2 * len(tokens), 16)  # type: ignore[union-attr]
    reported = same.choices[1].logprobs
    assert reported is not None
    assert reported.tokens is not None
    assert "".join(reported.tokens) == one.choices[0].text
    assert reported.text_offset == [sum(map(len, reported.tokens[:place])) for place in range(len(reported.tokens))]
    stream = client.completions.create(model="one", prompt="The sky is", temperature=0, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == one.choices[0].text


def test_logprobs_of_a_greedy_answer_are_the_highest(server: Running) -> None:
    client = server.client()
    options: Any = {"logprobs": True, "top_logprobs": 3, "temperature": 0, "max_tokens": 6}
    reply = client.chat.completions.create(model="two", messages=messages_of(QUESTIONS[0]), **options)
    reported = reply.choices[0].logprobs
    assert reported is not None
    assert reported.content
    for token in reported.content:
        assert token.logprob == max(other.logprob for other in token.top_logprobs)
        assert token.token in [each.token for each in token.top_logprobs if each.logprob == token.logprob]  # ties
        assert len(token.top_logprobs) == 3
        assert bytes(token.bytes or []).decode() == token.token
    chunks = client.chat.completions.create(model="two", messages=messages_of(QUESTIONS[0]), stream=True, **options)
    streamed = [
        token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content or ()
    ]
    assert [token.logprob for token in streamed] == pytest.approx(
        [token.logprob for token in reported.content], abs=1e-4
    )


def test_seed_n_and_stop(server: Running) -> None:
    client = server.client()

    def draw(**options: Any) -> list[str]:
        reply = client.chat.completions.create(
            model="base", messages=messages_of(QUESTIONS[1]), temperature=1.5, max_tokens=10, **options
        )
        return [choice.message.content or "" for choice in reply.choices]

    several = draw(seed=7, n=4)
    assert several == draw(seed=7, n=4)
    assert several[0] == draw(seed=7)[0]
    assert len(set(several)) > 1
    text = expected(server, "base", QUESTIONS[0])
    stop = text[len(text) // 2 :][:3]
    reply = client.chat.completions.create(
        model="base", messages=messages_of(QUESTIONS[0]), temperature=0, max_tokens=24, stop=stop
    )
    assert reply.choices[0].message.content == text[: text.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_logit_bias_and_schema(server: Running) -> None:
    client = server.client()
    (token,) = server.trained.base.tokenizer("a", add_special_tokens=False)["input_ids"]
    reply = client.completions.create(
        model="base", prompt="x", temperature=0, max_tokens=4, logit_bias={str(token): 100}
    )
    assert reply.choices[0].text == "aaaa"
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="two",
        messages=messages_of(QUESTIONS[0]),
        max_tokens=100,
        seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content or "")["city"] in ("Paris", "Rome")


def test_a_tool_is_called(tmp_path: Path) -> None:
    """The answer is held to the form of a call by a schema: the tiny base knows no tools."""
    template = tmp_path / "calls.jinja"
    template.write_text(
        "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
        ' as {"name": ..., "parameters": ...}\n{% endif %}'
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        encoding="utf-8",
    )
    trained = open_inference_model("lowrank/tiny", chat_template=str(template), notify=lambda text: None)
    schema = {
        "type": "object",
        "properties": {
            "name": {"const": "weather"},
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
    tool: Any = {"type": "function", "function": {"name": "weather", "description": "-", "parameters": {}}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "call", "schema": schema}}
    with serving(trained) as server:
        client = server.client()
        options: Any = {
            "model": "base",
            "messages": messages_of("Weather in Oslo?"),
            "tools": [tool],
            "max_tokens": 120,
        }
        options |= {"response_format": form, "temperature": 0}
        choice = client.chat.completions.create(**options).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        call = choice.message.tool_calls[0]
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
        chunks = list(client.chat.completions.create(**options, stream=True))
        assert not any(chunk.choices[0].delta.content for chunk in chunks)
        streamed = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or ()]
        assert streamed[0].function.arguments == call.function.arguments
        follow = [*options["messages"], choice.message.model_dump(exclude_none=True)]
        follow.append({"role": "tool", "tool_call_id": call.id, "content": "rain"})
        assert client.chat.completions.create(model="base", messages=follow, tools=[tool], max_tokens=4).choices
        plain = client.chat.completions.create(**options, tool_choice="none").choices[0]
        assert plain.message.tool_calls is None
        assert json.loads(plain.message.content or "")["name"] == "weather"


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"model": "three"}, 404, "base, one, two"),
        ({"extra_body": {"mirostat": 2}}, 400, "unsupported option: mirostat"),
        ({"extra_body": {"temperature": "hot", "audio": {}}}, 400, "temperature.*unsupported option: audio"),
        ({"top_logprobs": 2}, 400, "needs logprobs"),
        ({"logit_bias": {"99999": 1}}, 400, "there is no 99999"),
        ({"max_tokens": 10**6}, 400, "more than the"),
        ({"tool_choice": "required", "tools": []}, 400, "unsupported option: tool_choice"),
        ({"response_format": {"type": "xml"}}, 400, "response_format"),
        ({"messages": []}, 400, r"messages: expected at least 1 value, got \[\]"),
        ({"temperature": -1}, 400, "temperature: expected a number at least 0, got -1"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "robot"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            400,
            "image_url.*no URL is ever fetched",
        ),
        ({"n": 1000}, 400, "1000 answers"),
        (
            {"messages": [{"role": "user", "content": "word " * 3000}]},
            400,
            r"has \d+ tokens and the model's maximum context length is 1024",
        ),
    ],
)
def test_what_cannot_be_served_says_why(server: Running, options: dict[str, Any], status: int, message: str) -> None:
    given: Any = {"model": "base", "messages": messages_of("hello"), **options}
    with pytest.raises(openai.APIStatusError, match=f"(?s){message}") as caught:
        server.client().chat.completions.create(**given)
    assert caught.value.status_code == status
    assert caught.value.body is not None
    assert server.settles()


def test_of_a_hundred_thousand_problems_the_first_are_named(server: Running) -> None:
    """By a client that looks through nothing it sends."""
    reply = server.http().post("/v1/chat/completions", json={"model": "base", "messages": ["x"] * 100_000})
    assert reply.status_code == 400
    assert re.match(r"messages\.0: expected a group .*; and 99,980 more", reply.json()["error"]["message"])


def test_what_is_served_is_said_to_who_asks_for_another_route(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match=r"POST /v1/audio/speech is not served here; served are .*/v1/chat"):
        server.client().audio.speech.create(model="base", voice="alloy", input="hello")


def test_draws_of_unknown_length_and_many_at_once_leave_nothing_behind(server: Running) -> None:
    client = server.client()

    def one(seed: int) -> str:
        reply = client.chat.completions.create(
            model=("base", "one", "two")[seed % 3], messages=messages_of(QUESTIONS[seed % 4]), seed=seed, max_tokens=16
        )
        return reply.choices[0].message.content or ""

    with ThreadPoolExecutor(16) as pool:
        first, second = list(pool.map(one, range(32))), list(pool.map(one, range(32)))
    assert first == second
    assert server.settles()


def test_random_adapters_differ() -> None:
    """The world of these tests is worth something."""
    world = open_world()
    random_adapter(world, "three", 3)
    conversation = Conversation((Message("user", QUESTIONS[0]),))
    described = world.answer([(served, conversation) for served in world.slots], GenerationConfig(max_new_tokens=12))
    assert len(set(described)) == 4
