"""Whole replies and events of streams, in OpenAI's form."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from lowrank.data.chat.thoughts import Thinking
from lowrank.generate.request import Answer, TokenChunk
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.api.tool_calls import ToolCallReader

Json = dict[str, Any]


def usage(answers: Iterable[Answer], prompts: int) -> Json:
    """Tokens of all answers to `prompts` questions; a question counts once, however many answers it gets."""
    answers = list(answers)
    per_prompt = len(answers) // prompts
    prompt_tokens = sum(answer.prompt_tokens for answer in answers[::per_prompt])
    reused = sum(answer.cached_tokens for answer in answers[::per_prompt])
    completion_tokens = sum(len(answer.tokens) for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


class Choice:
    """One of the answers of a reply."""

    def __init__(self, reader: ToolCallReader | None, thoughts: Thinking | None = None) -> None:
        self.reader = reader
        self._thoughts = thoughts.reader() if thoughts is not None else None
        self.text = ""
        self.thought = ""
        self.fresh_thought = ""
        """Of the last chunk."""
        self.only_thought = False
        """It ended without an end of its thought, so that what it thought is the answer too."""
        self.tokens: list[Json] = []
        self.offset = 0
        self.finish: str | None = None
        self.calls: list[Json] = []

    def add(self, chunk: TokenChunk) -> str:
        """The text that can be shown now."""
        text, self.fresh_thought = chunk.text, ""
        if self._thoughts is not None:
            self.fresh_thought, text = self._thoughts.add(text)
            if chunk.finish is not None:
                more, rest = self._thoughts.end(whole=chunk.finish == "stop")
                self.fresh_thought, text = self.fresh_thought + more, text + rest
            self.thought += self.fresh_thought
            self.only_thought = bool(self.thought) and not self.text and text == self.thought
        if self.reader is not None:
            text = self.reader.add(text)
        if chunk.finish is not None:
            self.finish = chunk.finish
            if self.reader is not None:
                rest, calls = self.reader.end()
                text += rest
                self.calls = [{"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": c} for c in calls]
                self.finish = "tool_calls" if calls and chunk.finish == "stop" else chunk.finish
        self.text += text
        return text


class OpenAiStream:
    """How OpenAI streams: server-sent events, and a last word."""

    media_type = "text/event-stream"
    ending = "data: [DONE]\n\n"

    def write(self, event: Json) -> str:
        """As an event."""
        return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"

    def failed(self, refusal: ApiError) -> list[Json]:
        """The error, as it would be a whole reply."""
        return [refusal.body()]


class ChatReply(OpenAiStream):
    """A reply of `/v1/chat/completions`, made from the chunks of its answers."""

    def __init__(
        self,
        model: str,
        count: int,
        token_text: Callable[[int], str],
        *,
        logprobs: bool,
        reader: Callable[[], ToolCallReader] | None = None,
        thoughts: Thinking | None = None,
    ) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._token_text = token_text
        self._logprobs = logprobs
        self._choices = [Choice(reader() if reader else None, thoughts) for _ in range(count)]

    def opening(self) -> list[Json]:
        """The events before the first token."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, delta, None, None) for index in range(len(self._choices))]

    def add(self, index: int, chunk: TokenChunk) -> list[Json]:
        """The events that one chunk makes."""
        choice = self._choices[index]
        text = choice.add(chunk)
        tokens = logprob_entries(chunk, self._token_text) if self._logprobs else []
        choice.tokens += tokens
        chunks = []
        if choice.fresh_thought:
            chunks.append(self._chunk(index, {"reasoning_content": choice.fresh_thought}, None, None))
        if text or tokens:
            chunks.append(self._chunk(index, {"content": text}, self._wrapped(tokens), None))
        if choice.calls:
            calls = [{"index": number, **call} for number, call in enumerate(choice.calls)]
            chunks.append(self._chunk(index, {"tool_calls": calls}, None, None))
        if choice.finish is not None:
            chunks.append(self._chunk(index, {}, None, choice.finish))
        return chunks

    def whole(self, counts: Json) -> Json:
        """After all chunks."""
        choices = []
        for index, choice in enumerate(self._choices):
            message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.thought and not choice.only_thought:
                message["reasoning_content"] = choice.thought
            if choice.calls:
                message |= {"content": choice.text or None, "tool_calls": choice.calls}
            logprobs = self._wrapped(choice.tokens)
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish})
        return {"object": "chat.completion", **self._head, "choices": choices, "usage": counts}

    def closing(self, counts: Json | None) -> list[Json]:
        """The chunk with the usage."""
        chunk = {"object": "chat.completion.chunk", **self._head, "choices": [], "usage": counts}
        return [] if counts is None else [chunk]

    def _wrapped(self, tokens: list[Json]) -> Json | None:
        return {"content": tokens, "refusal": None} if self._logprobs else None

    def _chunk(self, index: int, delta: Json, logprobs: Json | None, finish: str | None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {"object": "chat.completion.chunk", **self._head, "choices": [choice]}


def logprob_entries(chunk: TokenChunk, token_text: Callable[[int], str]) -> list[Json]:
    """The log-probabilities of a chunk's token, in the form of chat replies."""
    if chunk.token is None or chunk.logprob is None:
        return []
    likeliest = [_token(token_text(token), logprob) for token, logprob in chunk.top]
    return [{**_token(token_text(chunk.token), chunk.logprob), "top_logprobs": likeliest}]


def _token(text: str, logprob: float) -> Json:
    """`bytes` is null for a token that is a part of a character."""
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
