"""What is thought and what is answered are told apart, and a form begins behind the thought."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lowrank.data.chat.channels import Channels
from lowrank.data.chat.rendering import Renderer
from lowrank.data.chat.thoughts import Thoughts, thoughts_of
from lowrank.data.config import DataConfig
from lowrank.data.formats.turns import think
from lowrank.generate.answer_text import answer_text_of
from lowrank.generate.detokenizer import IncrementalDetokenizer
from lowrank.pipelines.inference import open_inference_model
from lowrank.records import Conversation, Message
from lowrank.serve.api.forced_calls import grammar_of
from lowrank.serve.engines.torch import BankEngine
from tests.data.made_tokenizers import tokenizer_of, trl_template
from tests.serve.running import TOKEN, http_serving
from tests.serve.test_clients import TEMPLATE
from tests.serve.test_forced_calls import TOOLS, vocabulary  # noqa: F401 (a fixture)

PLAIN, BEGUN = Thoughts("<think>", "</think>", begun=False), Thoughts("<think>", "</think>", begun=True)
CHANNELS = Channels()
HM, FINAL = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"
THOUGHTFUL = Conversation((Message("user", "2+2?"), Message("assistant", "four", fields={"thinking": "hm"})))
SCHEMA: Any = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}


@pytest.mark.parametrize(
    ("thoughts", "text", "thought", "answer"),
    [
        (PLAIN, "<think>\nHm. 1 < 2\n</think>\n\nTwo.", "Hm. 1 < 2", "Two."),
        (PLAIN, "\n<think></think>\nTwo.\n", "", "Two.\n"),
        (PLAIN, "Two <think>of</think> them.", "", "Two <think>of</think> them."),
        (PLAIN, "<thin air", "", "<thin air"),
        (PLAIN, "<think>never ends </thin", "never ends </thin", ""),
        (PLAIN, "", "", ""),
        (PLAIN, "  ", "", "  "),
        (BEGUN, "Hm.\n</think>\n\n  Two.", "Hm.", "Two."),
        (BEGUN, "</think>Two.", "", "Two."),
        (BEGUN, "\nHm. Still", "Hm. Still", ""),
        (BEGUN, "a" + " " * 200 + "b</think>" + "\n" * 200 + "c", "a" + " " * 200 + "b", "c"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_however_it_comes(thoughts: Thoughts, text: str, thought: str, answer: str, size: int) -> None:
    reader = thoughts.reader()
    pieces_read = [reader.add(text[at : at + size]) for at in range(0, len(text), size)] + [reader.end()]
    assert ("".join(part for part, _ in pieces_read), "".join(part for _, part in pieces_read)) == (thought, answer)


@pytest.mark.parametrize(("thoughts", "text"), [(PLAIN, "<think>Two.\n"), (BEGUN, "\nTwo."), (CHANNELS, f"{HM}Two.")])
def test_a_thought_without_an_end_is_the_answer_of_a_model_that_ended_it(thoughts: Any, text: str) -> None:
    """A model that was never taught to think answers at once, also where its template opens a thought for it."""
    reader = thoughts.reader()
    pieces_read = [*map(reader.add, text), reader.end(whole=True)]
    assert ["".join(parts) for parts in zip(*pieces_read)] == ["Two.", "Two."]


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        (f"{HM}Hm. 1 < 2{FINAL}Two.", "Hm. 1 < 2", "Two."),
        ("<|channel|>final<|message|>Two.", "", "Two."),
        (f"{HM}Hm.<|start|>assistant<|channel|>final<|message|>Two.<|end|>", "Hm.", "Two."),
        (f"{HM}Hm. Still", "Hm. Still", ""),
        (' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}', "", CALL),
        (f'{HM}Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>'
         '{"city": "Oslo"}', "Hm.", CALL),
        ("<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.weather<|channel|>commentary"
         '<|message|>{"city": "Oslo"}', "", f"I look.{CALL}"),
        ("Two. <|channel|>", "", "Two. <|channel|>"),
        ('{"a": "to=b"}', "", '{"a": "to=b"}'),
        ("<|channel|>analysis", "", "<|channel|>analysis"),
        ("", "", ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_channels_however_they_come(text: str, thought: str, answer: str, size: int) -> None:
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    reader, aloud = CHANNELS.reader(), CHANNELS.left_in().reader()
    pieces_read = [*map(reader.add, pieces), reader.end()]
    assert ("".join(part for part, _ in pieces_read), "".join(part for _, part in pieces_read)) == (thought, answer)
    pieces_read = [*map(aloud.add, pieces), aloud.end()]
    assert "".join(part + rest for part, rest in pieces_read) == think(thought) + answer


def test_marks_are_control_tokens_that_the_text_leaves_out_unless_asked() -> None:
    tokenizer = tokenizer_of("gptoss", trl_template("gptoss"))
    (segment,) = Renderer(tokenizer, DataConfig()).render(THOUGHTFUL).segments
    learned = segment.token_L[segment.weight_L > 0].tolist()[:-1]
    for preserved, expected in ((CHANNELS.marks, f"{HM}hm{FINAL}four"), ((), "analysishmassistantfinalfour")):
        text = IncrementalDetokenizer(tokenizer, (), preserved)
        assert "".join([*map(text.add, learned), text.end()]) == expected
    renderer = Renderer(tokenizer, DataConfig())
    assert answer_text_of(renderer, learned) == "<think>\nhm\n</think>\n\nfour"


def test_templates_that_think() -> None:
    assert thoughts_of(trl_template("gptoss"), {}) == CHANNELS
    assert thoughts_of(trl_template("gemma4"), {}) == Thoughts("<|channel>thought", "<channel|>", begun=False)
    assert thoughts_of(trl_template("llama3"), {}) is None
    assert thoughts_of(trl_template("qwen3"), {}) == PLAIN
    assert thoughts_of(trl_template("qwen3_5_think"), {}) == BEGUN
    assert thoughts_of(trl_template("qwen3_5_think"), {"enable_thinking": False}) == PLAIN
    assert thoughts_of("{{ nothing.at.all }}</think>", {}) == PLAIN


def accepts(vocabulary: Any, grammar: str, text: str) -> bool:  # noqa: F811
    native = pytest.importorskip("llguidance")
    matcher = native.LLMatcher(vocabulary, native.LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.get_error(), matcher.get_error()
    tokens = vocabulary.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def test_a_form_begins_behind_the_thought(vocabulary: Any) -> None:  # noqa: F811
    plain = {"json_schema": SCHEMA}
    assert PLAIN.before(plain) == plain
    assert BEGUN.before({"json_schema": None}) == {"json_schema": None}
    grammar = BEGUN.before(plain)["grammar"]
    assert accepts(vocabulary, grammar, 'Where? Not {"city".\n</think>\n\n{"city": "Oslo"}')
    assert not accepts(vocabulary, grammar, '{"city": "Oslo"}')
    assert not accepts(vocabulary, grammar, 'Where?</think>{"city": "Paris"}')
    for template in ("<tool_call>", '"parameters"', "[TOOL_CALLS] [ARGS]"):
        called = BEGUN.before({"grammar": grammar_of(template, TOOLS[1:], several=True)})["grammar"]
        begun = {"<": "<tool_call>\n", '"': "", "[": ""}[template[0]]
        assert not accepts(vocabulary, called, f"{begun}...")
        assert "answer_in_form" in called
        assert called.count("start:") == 1


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A model that thinks as it begins, since its template says so; nobody taught it, so it never ends by itself."""
    template = tmp_path_factory.mktemp("template") / "thinks.jinja"
    template.write_text(
        TEMPLATE + "{% if enable_thinking is not defined %}<think>\n{% else %}</think>{% endif %}", "utf-8"
    )
    trained = open_inference_model("lowrank/tiny", chat_template=str(template), notify=lambda text: None)
    engine = BankEngine(trained.base, trained.bank, trained.renderer, trained.slots)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with http_serving(engine) as url, httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        yield client


REQUEST: Any = {"model": "base", "messages": [{"role": "user", "content": "The weather?"}], "temperature": 0}


def test_three_apis_tell_of_it(http: httpx.Client) -> None:
    chat = {**REQUEST, "max_tokens": 8}
    message = http.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]
    assert message["content"] == ""
    assert (thought := message["reasoning_content"])
    raw = http.post("/v1/chat/completions", json={**chat, "separate_reasoning": False}).json()["choices"][0]["message"]
    assert raw["content"].strip() == thought
    assert "reasoning_content" not in raw
    lines = http.post("/v1/chat/completions", json={**chat, "stream": True}).text.splitlines()
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == thought
    calm = http.post("/v1/chat/completions", json={**chat, "enable_thinking": False}).json()["choices"][0]["message"]
    assert "reasoning_content" not in calm
    options = {"num_predict": 8, "temperature": 0}
    ollama = {"model": "base", "messages": REQUEST["messages"], "stream": False, "options": options}
    assert http.post("/api/chat", json=ollama).json()["message"]["thinking"]
    body = {"model": "base", "input": "The weather?", "max_output_tokens": 8, "temperature": 0}
    whole = http.post("/v1/responses", json=body).json()["output"]
    assert [item["type"] for item in whole] == ["reasoning", "message"]
    events = http.post("/v1/responses", json={**body, "stream": True}).text.splitlines()
    events_read = [json.loads(line[6:]) for line in events if line.startswith("data: {")]
    deltas = [event["delta"] for event in events_read if event["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == events_read[-1]["response"]["output"][0]["content"][0]["text"]


def test_json_is_not_begun_within_a_thought(http: httpx.Client) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    reply = http.post("/v1/chat/completions", json={**REQUEST, "max_tokens": 400, "response_format": form, "seed": 1})
    message = reply.json()["choices"][0]["message"]
    assert message["reasoning_content"]
    assert message["content"] == "" or json.loads(message["content"])["city"] in ("Oslo", "Rome")


def test_ollama_says_what_it_is_and_what_it_is_not(http: httpx.Client) -> None:
    assert http.get("/api/ps").json()["models"][0]["name"] == "base"
    shown = http.post("/api/show", json={"model": "base"}).json()
    assert "thinking" in shown["capabilities"]
    for path, message in (("/api/embed", "POST /v1/embeddings"), ("/api/pull", "POST /v1/adapters")):
        reply = http.post(path, json={"model": "base", "input": "x"})
        assert reply.status_code == 501
        assert message in reply.json()["error"]
