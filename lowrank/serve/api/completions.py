"""`POST /v1/completions`: texts or tokens to go on with."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from lowrank.generate.request import TokenChunk
from lowrank.serve.api.generation_request import GenerationRequest, refuse_many
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.api.replies import Choice, Json, OpenAiStream, logprob_entries
from lowrank.serve.api.requests import AnswerRequest
from lowrank.serve.engine import PromptType, ServeEngine
from lowrank.serve.limits import RequestLimits

_DEFAULT_TOKENS = 16
"""OpenAI's."""


Token = Annotated[int, Field(ge=0, lt=1 << 31)]
"""No model has more; which there are, an engine says."""


class CompletionRequest(AnswerRequest):
    """What OpenAI defines."""

    prompt: str | list[Token] | list[str] | list[list[Token]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None

    def generation_request(self, engine: ServeEngine, limits: RequestLimits) -> GenerationRequest:
        """Its prompts, and how each of the `n` answers to each is drawn."""
        if self.best_of not in (None, self.n):
            raise ApiError(400, "unsupported option: best_of other than n: all answers are given", param="best_of")
        if self.suffix:
            raise ApiError(
                400,
                "unsupported option: suffix: these models go on with a text, they fill no gap in one",
                param="suffix",
            )
        if self.echo and self.logprobs is not None:
            raise ApiError(
                400, "unsupported option: echo with logprobs: prompts get no probabilities here", param="echo"
            )
        texts = listed(self.prompt, "prompt")
        refuse_many(len(texts) * self.n, limits)
        questions: list[PromptType] = [text if isinstance(text, str) else np.asarray(text, np.int64) for text in texts]
        tokens = self.max_tokens or min(_DEFAULT_TOKENS, limits.answer_tokens)
        echoed = [self._shown(each, engine) for each in questions for _ in range(self.n)] if self.echo else []
        count, with_logprobs = len(questions) * self.n, self.logprobs is not None
        reply = CompletionReply(self.model, count, engine.token_text, logprobs=with_logprobs, prompts=echoed)
        config = self.draw(limits, tokens, logprobs=self.logprobs)
        return GenerationRequest(
            self.model,
            questions,
            config,
            self.n,
            self.stream,
            reply,
            tuple(self.ignored),
            usage=self.stream_options.include_usage,
        )

    def _shown(self, question: PromptType, engine: ServeEngine) -> str:
        if isinstance(question, np.ndarray):
            return "".join(engine.token_text(int(token)) for token in question if 0 <= token < engine.vocabulary)
        return str(question)


def listed(given: str | list[int] | list[str] | list[list[int]], name: str) -> list[str | list[int]]:
    """A text or its tokens, or a list of either, as a list. ApiError if there is none."""
    one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    several: list[str | list[int]] = [given] if one else list(given)  # type: ignore[list-item]
    if not several:
        raise ApiError(400, f"{name}: there is none", param=name)
    return several


class CompletionReply(OpenAiStream):
    """A reply of `/v1/completions`, made from the chunks of its answers."""

    def __init__(
        self, model: str, count: int, token_text: Callable[[int], str], *, logprobs: bool, prompts: Sequence[str] = ()
    ) -> None:
        """`prompts`: what each answer begins with (`echo`)."""
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._token_text = token_text
        self._logprobs = logprobs
        self._choices = [Choice(None) for _ in range(count)]
        self._prompts = prompts
        for choice, prompt in zip(self._choices, prompts):
            choice.text = prompt

    def opening(self) -> list[Json]:
        """The prompts, where they are wanted."""
        return [
            {**self._head, "choices": [self._choice(index, prompt, [], None, 0)]}
            for index, prompt in enumerate(self._prompts)
        ]

    def add(self, index: int, chunk: TokenChunk) -> list[Json]:
        """The event that one chunk makes."""
        choice = self._choices[index]
        text = choice.add(chunk)
        tokens = logprob_entries(chunk, self._token_text) if self._logprobs else []
        choice.tokens += tokens
        offset, choice.offset = choice.offset, choice.offset + sum(len(token["token"]) for token in tokens)
        if not text and not tokens and choice.finish is None:
            return []
        return [{**self._head, "choices": [self._choice(index, text, tokens, choice.finish, offset)]}]

    def whole(self, counts: Json) -> Json:
        """After all chunks."""
        choices = [
            self._choice(index, choice.text, choice.tokens, choice.finish, 0)
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head, "choices": choices, "usage": counts}

    def closing(self, counts: Json | None) -> list[Json]:
        """The chunk with the usage."""
        return [] if counts is None else [{**self._head, "choices": [], "usage": counts}]

    def _choice(self, index: int, text: str, tokens: Sequence[Json], finish: str | None, offset: int) -> Json:
        logprobs = _old_form(tokens, offset) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


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
