"""Who may come in, with how much, and what is free again when they leave."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest

from lowrank.errors import ConfigError
from lowrank.serve.address import check_host
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.api.requests import ChatRequest
from lowrank.serve.limits import RequestLimits
from tests.serve.running import TOKEN, Running, open_world, serving

REQUEST: Any = {"model": "one", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
ANSWERED = 'lowrank_tokens_total{kind="answer"}'


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    limits = RequestLimits(body_bytes=20_000, body_seconds=1.0, waiting=2, max_num_seqs=2)
    with serving(open_world(), limits=limits, max_rows=2) as running:
        yield running


def long(server: Running, tokens: int = 900) -> dict[str, Any]:
    """A request that takes some seconds."""
    stops = server.engine.renderer.stop_tokens
    return {**REQUEST, "max_tokens": tokens, "logit_bias": {str(token): -100 for token in stops}, "stream": True}


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", "Bearer \u00e9\u00e9"])
def test_nobody_comes_in_without_the_token(server: Running, given: str) -> None:
    headers = [(b"authorization", given.encode("utf-8"))] if given else []
    with httpx.Client(base_url=server.url, headers=headers) as http:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/adapters", "/anything"):
            reply = http.get(path)
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
        assert http.post("/v1/chat/completions", json=REQUEST).status_code == 401
        assert http.get("/health").json() == {"status": "ok"}


def test_what_no_answer_can_be_drawn_by_is_the_clients_mistake() -> None:
    """Whatever the request itself lets pass."""
    request = ChatRequest.model_validate(REQUEST)
    for tokens, more in ((0, {}), (5, {"logprobs": 65})):
        with pytest.raises(ApiError) as caught:
            request.draw(RequestLimits(), tokens, **more)
        assert caught.value.status == 400


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil", 403),
        ("", 403),
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
    ],
)
def test_a_page_whose_name_was_pointed_at_us_is_refused(server: Running, host: str, status: int) -> None:
    for path in ("/v1/models", "/health"):
        assert server.http(Host=host).get(path).status_code == status


def test_too_large_too_slow_or_no_json(server: Running) -> None:
    http = server.http()
    large = {**REQUEST, "messages": [{"role": "user", "content": "x" * 20_000}]}
    assert http.post("/v1/chat/completions", json=large).status_code == 413
    pieces = (b"x" * 1000 for _ in range(30))  # without a length
    reply = http.post("/v1/chat/completions", content=pieces, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (413, "invalid_request_error")
    for body in (b"{", b"[1, 2", b'{"model": "one", "messages": [}', b"\xff", b"[" * 15_000):
        reply = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["type"] == "invalid_request_error"
    assert "JSON" in http.post("/v1/chat/completions", content=b"{", headers={"Content-Type": "application/json"}).text
    assert http.get("/nowhere").json()["error"]["message"].startswith("GET /nowhere is not served here")
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=10) as slow:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        slow.sendall((head + "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{").encode())
        started = time.monotonic()
        assert b" 408 " in slow.recv(4096)
        assert 0.5 < time.monotonic() - started < 8


def test_a_full_queue_says_when_to_come_back_and_who_leaves_makes_room(server: Running) -> None:
    client = server.client()
    with ExitStack() as leaving:
        for _ in range(4):
            leaving.enter_context(client.chat.completions.create(**long(server)))
        assert _until(lambda: _counter(server, "lowrank_answers_running") == 2)
        with pytest.raises(openai.RateLimitError, match="4 answers are in progress or wait") as caught:
            client.chat.completions.create(**REQUEST, max_tokens=2)
        assert int(caught.value.response.headers["retry-after"]) >= 1
    assert server.settles()
    assert client.chat.completions.create(**REQUEST, max_tokens=2).choices
    assert 'status="429"} 1' in server.http().get("/metrics").text


def test_a_client_that_leaves_while_it_waits_for_a_whole_answer_frees_its_slot(server: Running) -> None:
    before, answered = _counter(server, "lowrank_requests_cancelled_total"), _counter(server, ANSWERED)
    address = server.url.removeprefix("http://").split(":")
    body = json.dumps({**long(server), "stream": False}).encode()
    with socket.create_connection((address[0], int(address[1])), timeout=10) as leaving:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        leaving.sendall(
            (head + f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n").encode() + body
        )
        assert _until(lambda: server.engine.generator.num_running == 1)
    assert server.settles()
    assert _counter(server, "lowrank_requests_cancelled_total") == before + 1
    assert _counter(server, ANSWERED) - answered < 800, "it went on for nobody"


def test_an_answer_that_takes_too_long_is_stopped() -> None:
    with serving(open_world(), limits=RequestLimits(request_seconds=0.3)) as server:
        client = server.client()
        with pytest.raises(openai.APIStatusError, match=r"more than 0\.3 seconds") as caught:
            client.chat.completions.create(**{**long(server), "stream": False})
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"more than 0\.3 seconds"):
            list(client.chat.completions.create(**long(server)))
        assert server.settles()


def test_answers_in_the_making_end_when_the_server_is_stopped() -> None:
    received: list[Any] = []
    started = threading.Event()

    def listen(server: Running) -> None:
        for chunk in server.client().chat.completions.create(**long(server, 60)):
            received.append(chunk)
            started.set()

    with serving(open_world()) as server:
        thread = threading.Thread(target=listen, args=(server,))
        thread.start()
        assert started.wait(10)
    thread.join(10)
    assert received[-1].choices[0].finish_reason == "length"
    with pytest.raises(httpx.ConnectError), server.http() as http:
        http.get("/health")


def test_an_answer_that_fails_says_so_and_others_go_on(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = server.engine.generator

    def broken(plan: Any) -> Any:
        monkeypatch.undo()
        raise RuntimeError("no memory")

    monkeypatch.setattr(generator, "_forward", broken)
    with pytest.raises(openai.InternalServerError, match="no memory"):
        server.client().chat.completions.create(**REQUEST, max_tokens=4)
    assert server.client().chat.completions.create(**REQUEST, max_tokens=4).choices
    assert server.settles()


def test_metrics_count(server: Running) -> None:
    before = _counter(server, ANSWERED)
    reply = server.client().completions.create(model="one", prompt="a", max_tokens=3, temperature=0)
    assert reply.usage is not None
    assert _counter(server, ANSWERED) == before + reply.usage.completion_tokens
    text = server.http().get("/metrics").text
    for line in text.splitlines():
        assert line.startswith("# TYPE ") or float(line.rpartition(" ")[2]) >= 0
    assert 'lowrank_requests_total{route="/v1/completions",status="200"}' in text
    assert 'lowrank_request_seconds_bucket{le="+Inf"}' in text


def test_other_machines_need_a_token_that_was_chosen() -> None:
    for host in ("0.0.0.0", "192.168.1.2", "::", "example.org"):
        with pytest.raises(ConfigError, match="LOWRANK_TOKEN"):
            check_host(host, None)
        check_host(host, "chosen")
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        check_host(host, None)


def _until(holds: Callable[[], bool]) -> bool:
    """Whether it comes to hold within twenty seconds: a busy machine may take some."""
    end = time.monotonic() + 20
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _counter(server: Running, name: str) -> float:
    lines = server.http().get("/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " ")), 0.0)
