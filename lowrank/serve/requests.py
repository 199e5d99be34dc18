"""What clients send, as OpenAI defines it, and what it means to us. Nothing that would change an answer is ignored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowrank.data.columns import RowProblem
from lowrank.data.turns import read_tools, read_turns
from lowrank.generate.embedding import Pooling
from lowrank.generate.request import Config
from lowrank.records import Conversation
from lowrank.serve.engine import Question
from lowrank.serve.limits import Limits
from lowrank.serve.refusal import Refusal

_ROLES = ("system", "developer", "user", "assistant", "tool")
_DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(_Body):
    """What a stream holds besides text."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Padding against guessing by length; we send none."""


class AnswerRequest(_Body):
    """What both kinds of request share. The fields after `stream_options` change no answer."""

    model: str
    n: Annotated[int, Field(ge=1)] = 1
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def configs(self, limits: Limits, tokens: int, **more: Any) -> list[Config]:
        """One for each of the `n` answers; draws of several differ, also with a seed."""
        if tokens > limits.answer_tokens:
            message = f"max_tokens: {tokens} is more than the {limits.answer_tokens} this server gives"
            raise Refusal(400, message, param="max_tokens")
        same = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        try:
            config = Config(
                **{name: getattr(self, name) for name in same},
                top_k=max(0, self.top_k),
                logit_bias=self.logit_bias,
                stop=self.stops,
                max_new_tokens=tokens,
                seed=self.seed,
                **more,
            )
        except ValidationError as error:
            raise refused(error.errors()) from error
        seeds = [None if self.seed is None else self.seed + index for index in range(self.n)]
        return [config.model_copy(update={"seed": seed}) for seed in seeds]


class ChatRequest(AnswerRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] | None = None

    @property
    def reported(self) -> int | None:
        """How many of the likeliest tokens are told; None: no probabilities at all."""
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def uses_tools(self) -> bool:
        """The model is told of the tools, and its calls are looked for."""
        if self.tool_choice not in (None, "auto", "none"):
            message = "unsupported option: tool_choice can be auto or none; a call cannot be forced"
            raise Refusal(400, message, param="tool_choice")
        return bool(self.tools) and self.tool_choice != "none"

    def ask(self, limits: Limits) -> tuple[list[Question], list[Config]]:
        """The conversation, and how each of its answers is drawn."""
        try:
            tools = read_tools(self.tools) if self.uses_tools else ()
            conversation = Conversation(tuple(read_turns(_texts_only(self.messages), {})), tools)
        except RowProblem as problem:
            raise Refusal(400, f"messages: {problem}", param="messages") from problem
        tokens = self.max_completion_tokens or self.max_tokens or limits.chat_answer_tokens
        schema = _schema_of(self.response_format)
        return [conversation], self.configs(limits, tokens, logprobs=self.reported, json_schema=schema)


class CompletionRequest(AnswerRequest):
    """`POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None

    @property
    def uses_tools(self) -> bool:
        """Never: there is no template to tell of them."""
        return False

    def ask(self, limits: Limits) -> tuple[list[Question], list[Config]]:
        """Its prompts, and how each of the `n` answers to each is drawn."""
        for name, unusual in (("echo", self.echo), ("suffix", self.suffix), ("best_of", self.best_of or 1)):
            if unusual not in (False, None, "", self.n if name == "best_of" else None):
                raise Refusal(400, f"unsupported option: {name}", param=name)
        tokens = self.max_tokens or min(_DEFAULT_COMPLETION_TOKENS, limits.answer_tokens)
        questions: list[Question] = [*_each(self.prompt)]
        if not questions:
            raise Refusal(400, "prompt: there is none", param="prompt")
        return questions, self.configs(limits, tokens, logprobs=self.logprobs)


class EmbeddingRequest(_Body):
    """`POST /v1/embeddings`."""

    model: str
    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Pooling = "mean"
    """Not OpenAI's: the mean over a text's tokens, or the last one's state."""
    user: str | None = None

    def texts(self) -> list[str | np.ndarray]:
        """One or more. Refusal if there is none."""
        texts = _each(self.input)
        if not texts:
            raise Refusal(400, "input: there is none", param="input")
        return texts


class PublishRequest(_Body):
    """`POST /v1/adapters`."""

    name: Annotated[str, Field(pattern=r"^\w[\w.:/@+-]{0,127}$")]
    path: Annotated[str, Field(min_length=1, max_length=4096)]


def refused(errors: Sequence[Any]) -> Refusal:
    """pydantic's findings as one refusal that names every option."""
    broken = next((error for error in errors if error["type"] == "json_invalid"), None)
    if broken is not None:
        return Refusal(400, f"the body is not JSON: {broken.get('ctx', {}).get('error', broken['msg'])}")
    said, names = [], []
    for error in errors:
        name = ".".join(str(part) for part in error["loc"] if part != "body")
        names.append(name)
        if error["type"] == "extra_forbidden":
            said.append(f"unsupported option: {name}")
        else:
            said.append(f"{name}: {error['msg']}" if name else f"the body: {error['msg']}")
    return Refusal(400, "; ".join(dict.fromkeys(said)), param=names[0] or None)


def _texts_only(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Refuses roles OpenAI does not know, and anything but text: no URL is ever fetched for a client."""
    for number, message in enumerate(messages, start=1):
        where = f"messages[{number - 1}]"
        if message.get("role") not in _ROLES:
            known = ", ".join(_ROLES)
            raise Refusal(400, f"{where}.role: {message.get('role')!r} is none of {known}", param=where)
        content = message.get("content")
        kinds = [part.get("type") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
        others = [str(kind) for kind in kinds if kind != "text"]
        if others:
            message_ = (
                f"{where}: unsupported content {', '.join(others)}; only text is read, and no URL is ever fetched"
            )
            raise Refusal(400, message_, param=f"{where}.content")
    keys = ("role", "content", "tool_calls", "reasoning_content")
    return [
        {"content": "", **{key: message[key] for key in keys if message.get(key) is not None}} for message in messages
    ]


def _schema_of(response_format: dict[str, Any] | None) -> dict[str, Any] | None:
    kind = response_format.get("type") if response_format else "text"
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    described = response_format.get("json_schema") if response_format else None
    if kind == "json_schema" and isinstance(described, dict) and isinstance(described.get("schema"), dict):
        return described["schema"]
    message = 'response_format: expected {"type": "text" or "json_object"} or {"type": "json_schema", "json_schema": '
    raise Refusal(400, message + '{"name": ..., "schema": {...}}}', param="response_format")


def _each(given: str | list[int] | list[str] | list[list[int]]) -> list[str | np.ndarray]:
    """A text or its tokens, or a list of either, as a list."""
    one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    several: list[Any] = [given] if one else list(given)
    return [each if isinstance(each, str) else np.asarray(each, np.int64) for each in several]
