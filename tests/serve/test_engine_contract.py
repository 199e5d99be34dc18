"""What every engine of lowrank/serve/engines has to do alike: a new file there is asked all of this.

An engine whose packages are missing is skipped: vLLM is asked where its wheel is installed.
"""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from lowrank.errors import ConfigError
from lowrank.serve.engine import ServeEngine
from lowrank.serve.engines import EngineKind, ServingOptions, choose_engine, engine_kind, engine_names, open_engine
from tests.serve.engine_forms import FORMS, Forms
from tests.serve.running import TOKEN, http_serving, open_world

ROOT = Path(__file__).parents[2]
MESSAGES: Any = [{"role": "user", "content": "What is the capital of France?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "enum": [1, 2]}},
            "required": ["city", "days"],
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(open_world(), tmp_path_factory.mktemp("engines"))


@dataclass
class World:
    name: str
    engine: ServeEngine
    http: httpx.Client
    service: Any


@pytest.fixture(scope="module", params=engine_names())
def world(request: pytest.FixtureRequest, folder: Forms) -> Iterator[World]:
    kind = engine_kind(request.param)
    if kind.missing:
        pytest.skip(f"{', '.join(kind.missing)} is not installed")
    options = ServingOptions(request.param, [folder.adapters], max_num_seqs=4, kv_cache_tokens=4096, max_loras=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vLLM about others, as it is imported
        engine = open_engine(folder.read_by(kind), options)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    services: list[Any] = []
    with (
        http_serving(engine, services=services) as url,
        httpx.Client(base_url=url, headers=headers, timeout=120) as client,
    ):
        yield World(request.param, engine, client, services[0])
    assert not engine.alive


@pytest.fixture
def http(world: World) -> httpx.Client:
    return world.http


def post(http: httpx.Client, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
    requested = {"model": "base", "max_tokens": 24, "temperature": 0, **options}
    if path.endswith("chat/completions"):
        requested.setdefault("messages", MESSAGES)
    return http.post(path, json=requested)


def schema(of: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": of}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": ""}, "stop: a text of 0 characters"),
        ({"stop": ["a", ""]}, "stop: a text of 0 characters"),
        ({"logit_bias": {"3072": 1}}, "logit_bias: the model has 3072 tokens, there is no 3072"),
        ({"logit_bias": {"-1": 1}}, "there is no -1"),
        ({"response_format": schema({"type": "no such type"})}, "json_schema cannot be followed: Invalid type"),
        ({"response_format": schema({"$ref": "#/nowhere"})}, "json_schema cannot be followed"),
        ({"response_format": schema({"type": "string", "pattern": "("})}, "json_schema cannot be followed"),
        ({"response_format": schema({"type": "string", "minLength": 3, "maxLength": 1})}, "Unsatisfiable"),
        ({"response_format": schema({"enum": ["x" * 1000] * 1000})}, "characters; 262144 are read"),
        ({"messages": MESSAGES * 1100}, "1100 messages and the model's maximum context length is 1024"),
        (
            {"messages": [{"role": "user", "content": "word " * 3000}]},
            "tokens and the model's maximum context length is 1024",
        ),
        (
            {"messages": [{"role": "user", "content": "word " * 300_000}]},
            "tokens and the model's maximum context length is 1024",
        ),
        ({"model": "nobody"}, "there is no model 'nobody' here; there are base"),
        ({"n": 10**9}, "1000000000 answers in one request"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"temperature": 2.5}, "temperature"),
        ({"mirostat": 2}, "unsupported option: mirostat"),
    ],
)
def test_the_same_is_refused_in_the_same_words(http: httpx.Client, options: dict[str, Any], message: str) -> None:
    reply = post(http, **options)
    assert (reply.status_code, message in reply.text) == (404 if "model" in options else 400, True), reply.text[:300]
    error = reply.json()["error"]
    assert error["type"] in ("invalid_request_error", "not_found_error")
    assert "diverged" not in error["message"]


def test_extreme_penalties_blame_no_adapter(http: httpx.Client) -> None:
    extremes: list[dict[str, Any]] = [
        {"repetition_penalty": 100, "temperature": 2},
        {"presence_penalty": -2, "frequency_penalty": 2, "min_p": 1},
        {"logit_bias": {str(token): -100 for token in range(3072)}},
        {"top_p": 0},
    ]
    for options in extremes:
        reply = post(http, **options)
        assert reply.status_code == 200, reply.text


def test_a_schema_is_kept(http: httpx.Client) -> None:
    wanted = {
        "type": "object",
        "properties": {"x": {"enum": ["a", "b"]}},
        "required": ["x"],
        "additionalProperties": False,
    }
    reply = post(http, response_format=schema(wanted), max_tokens=60).json()
    assert json.loads(reply["choices"][0]["message"]["content"])["x"] in ("a", "b")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_is_made_where_it_must(http: httpx.Client, choice: Any) -> None:
    reply = post(http, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, max_tokens=80).json()
    (call,) = reply["choices"][0]["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert (call["function"]["name"], set(arguments)) == ("weather", {"city", "days"})
    assert reply["choices"][0]["finish_reason"] == "tool_calls"


def test_lengths_stops_and_several_answers(http: httpx.Client) -> None:
    whole = post(http).json()["choices"][0]["message"]["content"]
    assert post(http, max_tokens=3).json()["usage"]["completion_tokens"] <= 3
    stop = whole[len(whole) // 2 :][:3]
    stopped = post(http, stop=stop).json()["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    drawn = post(http, temperature=1.5, n=3, seed=3).json()["choices"]
    assert [choice["index"] for choice in drawn] == [0, 1, 2]
    texts = post(http, "/v1/completions", prompt="The sky is", n=2, max_tokens=4).json()["choices"]
    assert texts[0]["text"] == texts[1]["text"]


@pytest.mark.parametrize("name", engine_names())
def test_a_file_of_the_folder_is_an_engine(name: str, folder: Forms) -> None:
    kind = engine_kind(name)
    assert isinstance(kind, EngineKind)
    assert kind.takes
    assert bool(kind.packages) == bool(kind.extra)
    extras = (ROOT / "pyproject.toml").read_text("utf-8").partition("[project.optional-dependencies]")[2]
    assert not kind.extra or f"\n{kind.extra} = " in extras
    assert f"--engine {name}" in (ROOT / "docs/serving.md").read_text("utf-8")
    if (other := folder.foreign_to(kind)) is None:
        return
    with pytest.raises(ConfigError, match=f"--engine {name} reads {kind.takes}"):
        choose_engine(other, ServingOptions(name))


def test_a_path_chooses_its_engine(folder: Forms) -> None:
    assert choose_engine(str(folder.run), ServingOptions()) is engine_kind("torch")
    if not engine_kind("llama.cpp").missing:
        assert choose_engine(str(folder.gguf), ServingOptions()) is engine_kind("llama.cpp")
    with pytest.raises(ConfigError, match=r"no engine 'tourch'; did you mean 'torch'\?"):
        choose_engine(str(folder.run), ServingOptions("tourch"))
    with pytest.raises(ConfigError, match=", ".join(map(re.escape, sorted(["auto", *engine_names()])))):
        choose_engine(str(folder.run), ServingOptions("magic"))


ECHO = EngineKind(open=lambda path, options, notify: None, reads=lambda path: True, takes="all")  # type: ignore[arg-type]


@pytest.mark.usefixtures("allowed_code")
def test_a_third_partys_engine_is_found_by_name() -> None:
    assert choose_engine("x", ServingOptions(f"{__name__}:ECHO")) is ECHO
    with pytest.raises(ConfigError, match="--compile is of the engine torch"):
        choose_engine("x", ServingOptions(f"{__name__}:ECHO", compile=True))
    with pytest.raises(ConfigError, match=r"ROOT is a PosixPath; expected a lowrank\.serve\.engines\.EngineKind"):
        choose_engine("x", ServingOptions(f"{__name__}:ROOT"))


def test_an_engine_of_another_form_brings_its_form(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One entry of FORMS; without it, the contract says so."""
    onnx = EngineKind(open=ECHO.open, reads=lambda path: path.endswith(".onnx"), takes="ONNX files")
    monkeypatch.setitem(FORMS, "gguf", lambda trained, place, adapters: place / "x.gguf")
    monkeypatch.setitem(FORMS, "run", lambda trained, place, adapters: place / "run")
    trained: Any = None
    with pytest.raises(AssertionError, match="no form here is of ONNX files"):
        Forms(trained, tmp_path / "1").read_by(onnx)
    monkeypatch.setitem(FORMS, "onnx", lambda trained, place, adapters: place / "tiny.onnx")
    made = Forms(trained, tmp_path / "2")
    assert made.read_by(onnx) == str(tmp_path / "2" / "tiny.onnx")
    assert made.foreign_to(ECHO) is None
    assert made.foreign_to(onnx) == str(tmp_path / "2" / "run")


def test_the_base_comes_first_and_each_adapter_answers_for_itself(world: World) -> None:
    assert world.engine.name == world.name
    listed = {each["id"]: each.get("parent") for each in world.http.get("/v1/models").json()["data"]}
    assert next(iter(listed)) == "base"
    assert listed["one"] == listed["two"] == "base"
    answers = {name: post(world.http, model=name).json()["choices"][0]["message"]["content"] for name in listed}
    assert len({answers[name] for name in ("base", "one", "two")}) == 3
    for name in ("base", "one"):
        assert "".join(streamed(world.http, model=name)) == answers[name]
        assert world.engine.chat_template(name)


def test_all_of_them_at_once_answer_as_alone(world: World) -> None:
    """Also where every adapter that may be in memory is in one batch with the base (in vLLM, with as many rows as
    adapters, the base then answers as one of them)."""
    names = [each["id"] for each in world.http.get("/v1/models").json()["data"]]

    def answer_of(name: str) -> str:
        return post(world.http, model=name).json()["choices"][0]["message"]["content"]

    alone = [answer_of(name) for name in names]
    with ThreadPoolExecutor(len(names)) as pool:
        for _ in range(2):
            assert list(pool.map(answer_of, names)) == alone


def streamed(http: httpx.Client, **options: Any) -> Iterator[str]:
    requested = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0, "stream": True, **options}
    with http.stream("POST", "/v1/chat/completions", json=requested) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""


def test_who_leaves_holds_nothing(world: World) -> None:
    for _ in range(3):
        stream = streamed(world.http, model="one", max_tokens=900, logit_bias={"2": -100, "0": -100})
        next(stream)
        stream.close()
    for _ in range(500):
        load = world.engine.load()
        if (load.running, load.waiting, world.service.limiter.taken) == (0, 0, 0):
            break
        time.sleep(0.02)
    else:
        raise AssertionError(f"still held: {world.engine.load()}")
    assert post(world.http).status_code == 200


def test_adapters_come_and_go_or_the_engine_says_why_not(world: World, folder: Forms) -> None:
    wrong = world.http.post("/v1/adapters", json={"name": "four", "path": str(folder.run.parent)})
    assert wrong.status_code == 400
    reply = world.http.post("/v1/adapters", json={"name": "four", "path": "three"})
    names = [each["id"] for each in world.http.get("/v1/models").json()["data"]]
    assert (reply.status_code, "four" in names) in [(200, True), (400, False)], reply.text
    if reply.status_code == 200:
        answers = [post(world.http, model=name).json()["choices"][0]["message"]["content"] for name in ("one", "four")]
        assert answers[0] == answers[1]
        assert world.http.delete("/v1/adapters/four").status_code in (200, 204)
        assert post(world.http, model="four").status_code == 404
    else:
        assert reply.json()["error"]["message"]
    assert world.http.delete("/v1/adapters/base").status_code == 400
