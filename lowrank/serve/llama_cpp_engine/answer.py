"""One answer of llama.cpp's server, as it streams in."""

from __future__ import annotations

import http.client
import json
import math
import socket
from typing import Any

from lowrank.generate.request import Answer, TokenChunk
from lowrank.generate.token_stream import Listener, TokenStream
from lowrank.serve.api.http_errors import ApiError


class LlamaCppAnswer:
    """`PendingAnswer` (engine.py) over one streamed request."""

    def __init__(self, request: dict[str, Any], prompt_tokens: int, num_logprobs: int) -> None:
        self._request, self._prompt_tokens, self._emitted = request, prompt_tokens, num_logprobs
        self._stream = TokenStream()
        self._socket: socket.socket | None = None
        self._cancelled = False
        self._reused = 0

    @property
    def answer(self) -> Answer:
        """The answer as far as it is generated."""
        return self._stream.answer(prompt_tokens=self._prompt_tokens, reused_tokens=self._reused)

    def listen(self, listener: Listener) -> None:
        """Every chunk, those of the past first."""
        self._stream.listen(listener)

    def cancel(self) -> None:
        """llama.cpp frees the slot of a client that hangs up."""
        self._cancelled = True
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:  # it was over already
                return

    def follow(self, connection: http.client.HTTPConnection, headers: dict[str, str], texts: dict[int, str]) -> None:
        """Ask, and tell the chunks as they come."""
        self._socket = connection.sock
        if self._cancelled:
            raise ConnectionAbortedError
        connection.request("POST", "/completion", json.dumps(self._request), headers)
        reply = connection.getresponse()
        if reply.status != 200:
            checked(reply.status, reply.read())
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise ApiError(500, str(event["error"].get("message", event["error"])))
            self._on_event(event, texts)
            if event.get("stop"):
                return
        raise ConnectionAbortedError("llama.cpp ended in the middle of an answer")

    def give_up(self, error: Exception) -> None:
        """It ends early."""
        if not self._stream.finished:
            if self._cancelled:
                self._stream.push(TokenChunk(None, finish="cancelled"))
            else:
                self._stream.push(TokenChunk(None, finish="error", error=f"llama.cpp: {error}"))

    def _on_event(self, event: dict[str, Any], texts: dict[int, str]) -> None:
        """An event may have several tokens, where one alone was half a character; the last one carries the text."""
        tokens: list[int] = event.get("tokens") or []
        chances = event.get("completion_probabilities") or [None] * len(tokens)
        for place, (token, chance) in enumerate(zip(tokens, chances)):
            text = event["content"] if place == len(tokens) - 1 and not event["stop"] else ""
            self._stream.push(self._token_chunk(token, text, chance, texts))
        if event["stop"]:
            finish = "length" if event.get("stop_type") == "limit" else "stop"
            self._reused = max(0, self._prompt_tokens - int(event.get("timings", {}).get("prompt_n", math.inf)))
            self._stream.push(TokenChunk(None, event["content"], finish=finish))

    def _token_chunk(self, token: int, text: str, chance: dict[str, Any] | None, texts: dict[int, str]) -> TokenChunk:
        if chance is None:
            return TokenChunk(token, text)
        top = chance["top_logprobs"]
        texts.update({each["id"]: each["token"] for each in (chance, *top)})
        likeliest = tuple((each["id"], each["logprob"]) for each in top[: self._emitted])
        return TokenChunk(token, text, chance["logprob"], likeliest)


def checked(status: int, body: bytes) -> Any:
    """The content of a reply. ApiError with llama.cpp's own words for anything but 200."""
    content = json.loads(body)
    if status != 200:
        message = content.get("error", {}).get("message", body.decode("utf-8", "replace"))
        raise ApiError(400 if 400 <= status < 500 else 500, f"llama.cpp: {message}")
    return content
