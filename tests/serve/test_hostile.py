"""Requests and connections that mean no good: counted before anything is built, refused cheaply, nobody else waits."""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from lowrank.generate.detokenizer import IncrementalDetokenizer
from lowrank.serve.api.tool_calls import ToolCallReader
from lowrank.serve.limits import RequestLimits
from tests.serve.running import TOKEN, Running, open_world, serving

MESSAGES: Any = [{"role": "user", "content": "hello"}]
SMALL: Any = {"model": "base", "messages": MESSAGES, "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(open_world(), limits=RequestLimits(connections=40, header_seconds=1.0)) as running:
        yield running


def post(server: Running, body: Any, path: str = "/v1/chat/completions") -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.http().post(path, content=content, headers={"Content-Type": "application/json"})


HUGE: list[tuple[str, Any, str]] = [
    ("/v1/chat/completions", {**SMALL, "n": 10**9}, "1000000000 answers in one request"),
    ("/v1/completions", {"model": "base", "prompt": "x", "n": 10**9, "best_of": 10**9}, "1000000000 answers"),
    ("/v1/completions", {"model": "base", "prompt": ["x"] * 200_000}, "200000 answers"),
    ("/v1/completions", {"model": "base", "prompt": [5] * 900_000}, "900000 tokens"),
    ("/v1/chat/completions", {**SMALL, "messages": MESSAGES * 4000}, "4000 messages"),
    ("/v1/chat/completions", {**SMALL, "messages": MESSAGES * 60_000}, "60000 messages"),
    ("/v1/chat/completions", {**SMALL, "messages": [{"role": "user", "content": "a" * 3_900_000}]}, "at least"),
    ("/v1/chat/completions", {**SMALL, "messages": [{"role": "user", "content": "a b c d " * 480_000}]}, "at least"),
    ("/v1/completions", {"model": "base", "prompt": "\n" * 1_900_000}, "at least"),
    ("/v1/embeddings", {"model": "base", "input": "word " * 700_000}, "at least"),
    ("/v1/chat/completions", {**SMALL, "stop": ["z" * 200_000] * 16}, "stop: a text of 200000 characters"),
    ("/v1/chat/completions", {**SMALL, "stop": ["z"] * 17}, "stop"),
    ("/v1/chat/completions", {**SMALL, "seed": 10**30}, "seed"),
    ("/v1/chat/completions", {**SMALL, "chat_template_kwargs": {"messages": []}}, "not to be set here"),
]


@pytest.mark.parametrize(
    ("path", "body", "message"), HUGE, ids=[f"{index}-{each[2][:20]}" for index, each in enumerate(HUGE)]
)
def test_what_is_too_much_is_refused_before_anything_is_built(
    server: Running, path: str, body: Any, message: str
) -> None:
    content = json.dumps(body).encode()
    started = time.process_time()
    reply = post(server, content, path)
    assert (reply.status_code, message in reply.text) == (400, True), reply.text[:300]
    assert time.process_time() - started < 3  # the server runs in this process
    assert server.settles()


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "base", "messages": [{"role": "user", "content": "\\ud83d"}]}',
        b'{"model": "base", "messages": [{"role": "user", "content": "\\ude00\\ud83d"}]}',
        b'{"model": "\\udfff", "messages": []}',
        b'{"model": "base", "messages": [{"role": "user", "content": "\xed\xa0\xbd"}]}',
        b'{"model": "base", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "base", "messages": ' + b"[" * 100_000,
        b'{"model": "base", "seed": ' + b"9" * 100_000 + b', "messages": [{"role": "user", "content": "x"}]}',
        json.dumps({**SMALL, "messages": [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [
            {"id": "x", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}]}]}).encode(),
    ],
)  # fmt: skip
def test_half_characters_and_bottomless_json_are_a_400(server: Running, body: bytes) -> None:
    reply = post(server, body)
    assert reply.status_code == 400, reply.text[:300]
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_a_whole_emoji_is_none_of_them(server: Running) -> None:
    body = b'{"model": "base", "max_tokens": 1, "messages": [{"role": "user", "content": "\\ud83d\\ude00"}]}'
    assert post(server, body).status_code == 200


def test_n_of_completions(server: Running) -> None:
    requested = {"model": "base", "prompt": "a", "n": 2, "max_tokens": 2}
    for body in (requested, {**requested, "best_of": 2}):
        assert len(post(server, body, "/v1/completions").json()["choices"]) == 2
    assert "best_of" in post(server, {**requested, "best_of": 3}, "/v1/completions").text


def test_large_requests_stand_before_no_small_one(server: Running) -> None:
    """Eight that have to be tokenized; they share one thread."""
    large = {**SMALL, "messages": [{"role": "user", "content": "x" * 60_000}] * 30}
    content = json.dumps(large).encode()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(post, server, content) for _ in range(8)]
        time.sleep(0.1)
        started = time.monotonic()
        assert post(server, SMALL).status_code == 200
        assert time.monotonic() - started < 3
        assert {each.result().status_code for each in waiting} == {400}


def test_idle_connections_make_room(server: Running) -> None:
    """Sixty where forty may be open, half of them with half a header; whoever asks is answered."""
    host, port = server.url.removeprefix("http://").split(":")
    known = server.http()
    assert known.get("/v1/models").status_code == 200
    idle = []
    for index in range(60):
        connection = socket.create_connection((host, int(port)), timeout=10)
        if index % 2:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-")
        idle.append(connection)
    with httpx.Client() as stranger:
        assert stranger.get(f"{server.url}/health").status_code == 200
    assert known.get("/v1/models").status_code == 200
    assert server.http().get("/v1/models").status_code == 200
    time.sleep(2.0)  # the time a header may take
    for connection in idle:
        connection.settimeout(5)
        try:
            assert connection.recv(100) == b""
        except ConnectionResetError:
            continue
        finally:
            connection.close()


def test_a_header_that_drips_is_cut_off(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        head = f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
        slow.sendall(head)
        assert b" 200 " in slow.recv(4096)
        started = time.monotonic()
        with pytest.raises(OSError):  # noqa: PT012 (reset, or a broken pipe)
            for _ in range(60):  # the second request drips
                slow.sendall(b"G" if time.monotonic() == started else b"x")
                time.sleep(0.1)
                if slow.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b"":
                    raise ConnectionResetError
        assert time.monotonic() - started < 5


def test_a_request_that_leaves_no_token_is_blamed_not_the_adapter(server: Running) -> None:
    schema = {"type": "string", "pattern": "^((a{1,500}){1,500}){1,500}$"}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for _ in range(2):
        reply = post(server, {**SMALL, "max_tokens": 40, "response_format": form})
        assert reply.status_code in (200, 400)
        assert "diverged" not in reply.text
    reply = post(server, {**SMALL, "response_format": {**form, "json_schema": {"name": "x", "schema": {"$ref": "#"}}}})
    assert (reply.status_code, "json_schema cannot be followed" in reply.text) == (400, True), reply.text


@pytest.mark.parametrize(
    "written",
    [
        "<tool_call>" * 20_000,
        "<tool_call>" + " " * 300_000,
        "<tool_call><function=f>" + "<parameter=" * 20_000,
        "<tool_call><function=f>" + "<parameter=a>\n" * 20_000,
        "<tool_call>f" + "<arg_key>" * 20_000,
        "<tool_call>f" + "<arg_key>a</arg_key>" * 20_000,
        '<tool_call>{"name": "f", "arguments": ' + "[" * 200_000,
        '{"name": "f", "parameters": {}};' * 10_000,
        "[" * 200_000,
        "f{}" * 50_000,
        "f" * 200_000,
        " " * 200_000,
    ],
)
@pytest.mark.parametrize("template", ["<tool_call>", "[TOOL_CALLS]"])
def test_calls_are_read_in_linear_time(template: str, written: str) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    reader = ToolCallReader(template, tools)
    started = time.process_time()
    text = "".join(reader.add(written[at : at + 8]) for at in range(0, len(written), 8))
    rest, calls = reader.end()
    assert time.process_time() - started < 2
    assert calls or text + rest == written


def test_stop_texts_are_found_as_by_searching_the_whole() -> None:
    class Letters:
        def decode(self, tokens: list[int], **_: Any) -> str:
            return "".join(map(chr, tokens))

    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice("ab") for _ in range(30))
        stops = ["".join(draw.choice("ab") for _ in range(draw.randint(1, 7))) for _ in range(3)]
        stream = IncrementalDetokenizer(Letters(), stops)
        shown = ""
        for letter in text:
            shown += stream.add(ord(letter))
            if stream.stopped_by:
                break
        shown += stream.end()
        ends = [found.end() for stop in stops if (found := re.search(stop, text))]
        first = min(ends, default=None)
        longest = max((len(stop) for stop in stops if first and text[:first].endswith(stop)), default=0)
        assert shown == (text if first is None else text[: first - longest])


def test_long_stop_texts_cost_nobody_time() -> None:
    class Letters:
        def decode(self, tokens: list[int], **_: Any) -> str:
            return "".join(map(chr, tokens))

    stream = IncrementalDetokenizer(Letters(), ["z" * 1024] * 8 + [("z" * 1023) + "y"] * 8)
    started = time.process_time()
    for _ in range(1000):
        stream.add(ord("z"))
    assert time.process_time() - started < 2


def test_a_client_that_reads_nothing_loses_its_place() -> None:
    limits = RequestLimits(request_seconds=1.0)
    with serving(open_world(), limits=limits) as server:
        stops = server.engine.renderer.stop_tokens
        body = {**SMALL, "max_tokens": 900, "stream": True, "logit_bias": {str(token): -100 for token in stops}}
        done = threading.Event()
        host, port = server.url.removeprefix("http://").split(":")
        content = json.dumps(body).encode()
        with socket.create_connection((host, int(port)), timeout=10) as deaf:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
            deaf.sendall((head + f"Content-Length: {len(content)}\r\n\r\n").encode() + content)
            assert server.settles() or done.is_set()
