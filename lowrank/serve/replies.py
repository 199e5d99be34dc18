"""What clients receive: whole replies and chunks of streams, in OpenAI's form."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lowrank.generate.request import Answer, Piece
from lowrank.serve.tool_calls import ToolCallReader

Json = dict[str, Any]


def usage(answers: Iterable[Answer], prompts: int) -> Json:
    """Tokens of all answers to `prompts` questions; a question counts once, however many answers it gets."""
    answers = list(answers)
    per_prompt = len(answers) // prompts
    asked = sum(answer.prompt_tokens for answer in answers[::per_prompt])
    reused = sum(answer.reused_tokens for answer in answers[::per_prompt])
    said = sum(len(answer.tokens) for answer in answers)
    return {
        "prompt_tokens": asked,
        "completion_tokens": said,
        "total_tokens": asked + said,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def embeddings(model: str, vectors: Sequence[np.ndarray], tokens: int, encoding: str) -> Json:
    """A reply of `/v1/embeddings`; base64 is of little-endian float32, as OpenAI's client asks for by itself."""
    data = []
    for index, vector_D in enumerate(vectors):
        raw = base64.b64encode(vector_D.astype("<f4").tobytes()).decode() if encoding == "base64" else vector_D.tolist()
        data.append({"object": "embedding", "index": index, "embedding": raw})
    counts = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": model, "data": data, "usage": counts}


class _Choice:
    """One of the answers of a reply."""

    def __init__(self, reader: ToolCallReader | None) -> None:
        self.reader = reader
        self.text = ""
        self.tokens: list[Json] = []
        self.offset = 0
        self.finish: str | None = None
        self.calls: list[Json] = []

    def add(self, piece: Piece) -> str:
        """The text that can be shown now."""
        text = piece.text if self.reader is None else self.reader.add(piece.text)
        if piece.finish is not None:
            self.finish = piece.finish
            if self.reader is not None:
                rest, calls = self.reader.end()
                text += rest
                self.calls = [{"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": c} for c in calls]
                self.finish = "tool_calls" if calls and piece.finish == "stop" else piece.finish
        self.text += text
        return text


class ChatReply:
    """A reply of `/v1/chat/completions`, made from the pieces of its answers."""

    def __init__(
        self,
        model: str,
        count: int,
        token_text: Callable[[int], str],
        *,
        logprobs: bool,
        reader: Callable[[], ToolCallReader] | None = None,
    ) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._token_text = token_text
        self._logprobs = logprobs
        self._choices = [_Choice(reader() if reader else None) for _ in range(count)]

    def opening(self) -> list[Json]:
        """The chunks before the first token."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, delta, None, None) for index in range(len(self._choices))]

    def add(self, index: int, piece: Piece) -> list[Json]:
        """The chunks one piece makes."""
        choice = self._choices[index]
        text = choice.add(piece)
        tokens = _tokens(piece, self._token_text) if self._logprobs else []
        choice.tokens += tokens
        chunks = []
        if text or tokens:
            chunks.append(self._chunk(index, {"content": text}, self._wrapped(tokens), None))
        if choice.calls:
            calls = [{"index": number, **call} for number, call in enumerate(choice.calls)]
            chunks.append(self._chunk(index, {"tool_calls": calls}, None, None))
        if choice.finish is not None:
            chunks.append(self._chunk(index, {}, None, choice.finish))
        return chunks

    def whole(self, counts: Json) -> Json:
        """After all pieces."""
        choices = []
        for index, choice in enumerate(self._choices):
            message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.calls:
                message |= {"content": choice.text or None, "tool_calls": choice.calls}
            logprobs = self._wrapped(choice.tokens)
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish})
        return {"object": "chat.completion", **self._head, "choices": choices, "usage": counts}

    def last(self, counts: Json) -> Json:
        """The chunk with the usage."""
        return {"object": "chat.completion.chunk", **self._head, "choices": [], "usage": counts}

    def _wrapped(self, tokens: list[Json]) -> Json | None:
        return {"content": tokens, "refusal": None} if self._logprobs else None

    def _chunk(self, index: int, delta: Json, logprobs: Json | None, finish: str | None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {"object": "chat.completion.chunk", **self._head, "choices": [choice]}


class CompletionReply:
    """A reply of `/v1/completions`, made from the pieces of its answers."""

    def __init__(self, model: str, count: int, token_text: Callable[[int], str], *, logprobs: bool) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._token_text = token_text
        self._logprobs = logprobs
        self._choices = [_Choice(None) for _ in range(count)]

    def opening(self) -> list[Json]:
        """Nothing."""
        return []

    def add(self, index: int, piece: Piece) -> list[Json]:
        """The chunk one piece makes."""
        choice = self._choices[index]
        text = choice.add(piece)
        tokens = _tokens(piece, self._token_text) if self._logprobs else []
        choice.tokens += tokens
        offset, choice.offset = choice.offset, choice.offset + sum(len(token["token"]) for token in tokens)
        if not text and not tokens and choice.finish is None:
            return []
        return [{**self._head, "choices": [self._choice(index, text, tokens, choice.finish, offset)]}]

    def whole(self, counts: Json) -> Json:
        """After all pieces."""
        choices = [
            self._choice(index, choice.text, choice.tokens, choice.finish, 0)
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head, "choices": choices, "usage": counts}

    def last(self, counts: Json) -> Json:
        """The chunk with the usage."""
        return {**self._head, "choices": [], "usage": counts}

    def _choice(self, index: int, text: str, tokens: Sequence[Json], finish: str | None, offset: int) -> Json:
        logprobs = _old_form(tokens, offset) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _tokens(piece: Piece, token_text: Callable[[int], str]) -> list[Json]:
    """What the model thought of a piece's token, in the form of chat replies."""
    if piece.token is None or piece.logprob is None:
        return []
    likeliest = [_token(token_text(token), logprob) for token, logprob in piece.top]
    return [{**_token(token_text(piece.token), piece.logprob), "top_logprobs": likeliest}]


def _token(text: str, logprob: float) -> Json:
    """`bytes` is null for a token that is a part of a character."""
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _old_form(tokens: Sequence[Json], offset: int) -> Json:
    """As completions have it: lists beside each other."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token["token"])
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [{each["token"]: each["logprob"] for each in token["top_logprobs"]} for token in tokens],
        "text_offset": offsets,
    }
