"""The other APIs, without their clients (`make test-clients` runs those): what is honored, named, refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lowrank.pipelines.inference import open_inference_model
from lowrank.serve.engines.torch import BankEngine
from tests.serve.running import TOKEN, http_serving
from tests.serve.test_clients import TEMPLATE

CHAT, RESPONSES, OLLAMA = "/v1/chat/completions", "/v1/responses", "/api/chat"
MESSAGES: Any = [{"role": "user", "content": "The weather?"}]
SCHEMA: Any = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
REQUEST: dict[str, Any] = {
    CHAT: {"model": "base", "messages": MESSAGES, "max_tokens": 6, "temperature": 0},
    RESPONSES: {"model": "base", "input": MESSAGES, "max_output_tokens": 6, "temperature": 0},
    OLLAMA: {"model": "base", "messages": MESSAGES, "stream": False, "options": {"num_predict": 6, "temperature": 0}},
}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    template = tmp_path_factory.mktemp("template") / "tools.jinja"
    thinks = "{% if enable_thinking is defined %}<think>{{ enable_thinking }}</think>{% endif %}"
    template.write_text(TEMPLATE + thinks, "utf-8")
    trained = open_inference_model("lowrank/tiny", chat_template=str(template), notify=lambda text: None)
    engine = BankEngine(trained.base, trained.bank, trained.renderer, trained.slots)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with (
        http_serving(engine, origins=["https://page.example"]) as url,
        httpx.Client(base_url=url, headers=headers, timeout=60) as client,
    ):
        yield client


def post(http: httpx.Client, path: str, **options: Any) -> httpx.Response:
    return http.post(path, json={**REQUEST[path], **options})


def test_one_chat_in_three_apis(http: httpx.Client) -> None:
    chat = post(http, CHAT).json()["choices"][0]["message"]["content"]
    reply = post(http, RESPONSES).json()
    assert reply["output"][0]["content"][0]["text"] == chat
    draws = {"num_predict": 6, "temperature": 0, "repeat_penalty": 1.0, "top_k": 0, "top_p": 1.0}
    assert post(http, OLLAMA, options=draws).json()["message"]["content"] == chat
    counts = reply["usage"]
    assert counts["total_tokens"] == counts["input_tokens"] + counts["output_tokens"]


def test_events_build_the_response(http: httpx.Client) -> None:
    text = post(http, RESPONSES, stream=True).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert [event["type"] for event in events] == names
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    last = events[-1]["response"]
    assert (
        deltas
        == last["output"][0]["content"][0]["text"]
        == post(http, RESPONSES).json()["output"][0]["content"][0]["text"]
    )
    flat = {"type": "function", **TOOL["function"]}
    options: Any = {"tools": [flat], "tool_choice": "required", "max_output_tokens": 90, "parallel_tool_calls": False}
    called = post(http, RESPONSES, **options).json()["output"]
    assert [item["type"] for item in called] == ["function_call"]
    assert json.loads(called[0]["arguments"])["city"] in ("Oslo", "Rome")


def test_ollama_streams_lines(http: httpx.Client) -> None:
    lines = [json.loads(line) for line in post(http, OLLAMA, stream=True).text.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    whole = post(http, OLLAMA).json()
    assert "".join(line["message"]["content"] for line in lines) == whole["message"]["content"]
    assert (lines[-1]["eval_count"], lines[-1]["done_reason"]) == (whole["eval_count"], whole["done_reason"])
    held = post(http, OLLAMA, format=SCHEMA, options={"num_predict": 60, "temperature": 0}).json()
    assert json.loads(held["message"]["content"])["city"] in ("Oslo", "Rome")
    assert http.get("/api/tags").json()["models"][0]["name"] == "base"
    assert http.get("/api/version").json()["version"]
    assert "tools" in http.post("/api/show", json={"model": "base"}).json()["capabilities"]
    raw = http.post("/api/generate", json={"model": "base", "prompt": "The sky", "raw": True, "stream": False})
    assert raw.json()["prompt_eval_count"] < post(http, OLLAMA).json()["prompt_eval_count"]


@pytest.mark.parametrize(
    ("path", "options", "named"),
    [
        (CHAT, {"reasoning_effort": "low"}, "reasoning_effort"),
        (CHAT, {"verbosity": "low", "store": True, "service_tier": "flex", "keep_alive": 5}, "verbosity"),
        (CHAT, {"chat_template_kwargs": {"nobody_reads": 1}}, "nobody_reads"),
        (CHAT, {"chat_template_kwargs": {"ant": 1}}, "ant"),  # which stands in other words of the template
        (RESPONSES, {"reasoning": {"effort": "low", "summary": "auto"}, "include": ["x"]}, "reasoning.summary"),
        (OLLAMA, {"options": {"num_ctx": 9, "num_predict": 2}, "think": "low"}, "options.num_ctx"),
    ],
)
def test_what_has_no_effect_is_named(http: httpx.Client, path: str, options: Any, named: str) -> None:
    reply = post(http, path, **options)
    assert reply.status_code == 200, reply.text
    assert named in reply.headers["x-lowrank-warning"]


def test_what_needs_no_effect_is_not_named(http: httpx.Client) -> None:
    options = {"user": "me", "metadata": {"a": "b"}, "modalities": ["text"], "store": False, "service_tier": "auto"}
    reply = post(http, CHAT, **options, prompt_cache_key="k", safety_identifier="s", verbosity="medium")
    assert (reply.status_code, "x-lowrank-warning" in reply.headers) == (200, False)


def test_the_template_hears_of_thinking(http: httpx.Client) -> None:
    plain = post(http, CHAT).json()["usage"]["prompt_tokens"]
    for options in ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}):
        reply = post(http, CHAT, **options)
        assert "x-lowrank-warning" not in reply.headers
        assert reply.json()["usage"]["prompt_tokens"] > plain
    assert post(http, OLLAMA, think=False).json()["prompt_eval_count"] > plain


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
        (CHAT, {"functions": []}, "unsupported option: functions"),
        (CHAT, {"tools": [TOOL], "tool_choice": "must"}, "tool_choice"),
        (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id: nothing is kept"),
        (RESPONSES, {"tools": [{"type": "web_search"}]}, "unsupported tool 'web_search'"),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, "input[0]: unsupported item"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        (RESPONSES, {"background": True}, "background"),
        (RESPONSES, {"nonsense": 1}, "unsupported option: nonsense"),
        (OLLAMA, {"options": {"mirostat": 1}}, "options.mirostat"),
        (OLLAMA, {"format": "xml"}, "format"),
        (OLLAMA, {"messages": [{"role": "user", "content": "x", "images": ["eA=="]}]}, "images"),
    ],
)
def test_what_cannot_be_is_refused_by_name(http: httpx.Client, path: str, options: Any, message: str) -> None:
    reply = post(http, path, **options)
    error = reply.json()["error"]
    assert (reply.status_code, message in (error if path == OLLAMA else error["message"])) == (400, True), reply.text


def test_echo_suffix_and_dimensions(http: httpx.Client) -> None:
    plain = {"model": "base", "prompt": "The sky", "max_tokens": 4, "temperature": 0}
    text = http.post("/v1/completions", json=plain).json()["choices"][0]["text"]
    echoed = http.post("/v1/completions", json={**plain, "echo": True}).json()["choices"][0]["text"]
    assert echoed == "The sky" + text
    assert "suffix" in http.post("/v1/completions", json={**plain, "suffix": "."}).json()["error"]["message"]
    requested = {"model": "base", "input": "The sky", "dimensions": 8}
    vector = http.post("/v1/embeddings", json=requested).json()["data"][0]["embedding"]
    assert len(vector) == 8
    assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-5)


def test_pages_that_were_named_may_ask(http: httpx.Client) -> None:
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    for origin, allowed in (("https://page.example", True), ("https://other.example", False)):
        with httpx.Client(base_url=http.base_url) as browser:  # a browser sends no token beforehand
            reply = browser.options(CHAT, headers={"Origin": origin, **preflight})
        assert (reply.headers.get("access-control-allow-origin") == origin) == allowed
        assert (reply.status_code == 200) == allowed
    reply = http.post(CHAT, json=REQUEST[CHAT], headers={"Origin": "https://page.example"})
    assert reply.headers["access-control-allow-origin"] == "https://page.example"
