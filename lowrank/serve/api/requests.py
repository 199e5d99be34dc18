"""What clients send, as OpenAI defines it, and what it means to us. Nothing that would change an answer is ignored
in silence: it is refused by name, or named in a header of the reply (`GenerationRequest.ignored`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from lowrank.data.chat.thoughts import Thinking, thoughts_of
from lowrank.data.formats.columns import RowProblem
from lowrank.data.formats.turns import read_tools
from lowrank.generate.request import GenerationConfig
from lowrank.serve.api.forced_calls import grammar_of
from lowrank.serve.api.generation_request import GenerationRequest, refuse_many
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.api.messages import details_of, read_messages
from lowrank.serve.api.replies import ChatReply
from lowrank.serve.api.tool_calls import ToolCallReader
from lowrank.serve.api.tool_choice import read_tool_choice
from lowrank.serve.engine import ChatPrompt, ServeEngine
from lowrank.serve.limits import RequestLimits
from lowrank.setting_problems import complaint

_TAKEN = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "chat_template")
"""Variables of a chat template that are not the client's to set."""
_MOST_PROBLEMS = 20


class RequestBody(BaseModel):
    """A request of any route; an option that is null counts as left out."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


Kind = TypeVar("Kind", bound=RequestBody)


def parse(kind: type[Kind], raw: bytes) -> Kind:
    """A request's body; ApiError for what is no JSON (half an emoji is none), too deep, or not as `kind` says."""
    try:
        content = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        half = ": half of a character (a lone surrogate)" if "surrogate" in str(error) else ""
        raise ApiError(400, f"the body is not JSON{half}: {error}") from error
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise refused(error.errors(include_url=False)) from error


class StreamOptions(RequestBody):
    """What a stream holds besides text."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Padding against guessing by length; we send none."""


class AnswerRequest(RequestBody):
    """What both kinds of request share. The fields after `stream_options` change no answer."""

    model: str
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
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
    prompt_cache_retention: str | None = None
    store: bool | None = None
    service_tier: str | None = None
    keep_alive: Any = None

    @property
    def ignored(self) -> list[str]:
        """Options that a client may think have an effect."""
        found = ["store"] if self.store else []
        found += ["service_tier"] if self.service_tier not in (None, "auto", "default") else []
        return found + (["keep_alive"] if self.keep_alive is not None else [])

    def stops(self, limits: RequestLimits) -> tuple[str, ...]:
        """Texts that end the answer. ApiError for an empty one, which would end any answer, and for very long ones."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        for text in stops:
            if not 0 < len(text) <= limits.stop_letters:
                message = f"stop: a text of {len(text)} characters; expected 1 to {limits.stop_letters}"
                raise ApiError(400, message, param="stop")
        return stops

    def draw(self, limits: RequestLimits, tokens: int, **more: Any) -> GenerationConfig:
        """How each answer is drawn."""
        if tokens > limits.answer_tokens:
            message = f"max_tokens: {tokens} is more than the {limits.answer_tokens} this server gives"
            raise ApiError(400, message, param="max_tokens")
        same = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        drawn = {name: getattr(self, name) for name in (*same, "logit_bias", "seed")}
        drawn |= {"top_k": max(0, self.top_k), "stop": self.stops(limits), "max_new_tokens": tokens, **more}
        try:
            return GenerationConfig.model_validate(drawn)
        except ValidationError as error:
            raise refused(error.errors()) from error


@dataclass(frozen=True)
class Understood:
    """A chat: what is asked, how answers are drawn, who reads calls and thoughts out of them, what has no effect."""

    question: ChatPrompt
    config: GenerationConfig
    reader: Callable[[], ToolCallReader] | None
    thoughts: Thinking | None
    ignored: list[str]


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
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    separate_reasoning: bool = True
    """Not OpenAI's: false leaves what a model thinks in the text, between its tags."""

    @property
    def reported(self) -> int | None:
        """How many of the likeliest tokens are told; None: no probabilities at all."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def generation_request(self, engine: ServeEngine, limits: RequestLimits) -> GenerationRequest:
        """The conversation, how its answers are drawn, and their reply in OpenAI's form."""
        refuse_many(self.n, limits)
        chat = self.understood(engine, limits)
        reply = ChatReply(
            self.model, self.n, engine.token_text, logprobs=self.logprobs, reader=chat.reader, thoughts=chat.thoughts
        )
        return GenerationRequest(
            self.model,
            [chat.question],
            chat.config,
            self.n,
            self.stream,
            reply,
            tuple(chat.ignored),
            usage=self.stream_options.include_usage,
        )

    def understood(self, engine: ServeEngine, limits: RequestLimits) -> Understood:
        """What it means to us, whatever form its reply has."""
        template = engine.chat_template(self.model)
        choice = read_tool_choice(self.tools, self.tool_choice)
        variables, ignored = self._variables(template)
        try:
            tools = read_tools(choice.shown)
        except (RowProblem, RecursionError) as problem:
            raise ApiError(400, f"messages: {problem}", param="messages") from problem
        turns = read_messages(self.messages, engine, limits)
        form: dict[str, Any] = {"json_schema": _schema_of(self.response_format)}
        if choice.forced:
            form = {"grammar": grammar_of(template, choice.callable, several=self.parallel_tool_calls)}
        thoughts = thoughts_of(template, {**engine.chat_variables(self.model), **variables}) if template else None
        if thoughts is not None:
            form = thoughts.before(form)
        tokens = self.max_completion_tokens or self.max_tokens or limits.chat_answer_tokens
        marks = () if thoughts is None else thoughts.marks
        config = self.draw(limits, tokens, logprobs=self.reported, preserved_tokens=marks, **form)
        most = None if self.parallel_tool_calls else 1
        reader = None
        if choice.callable:
            reader = lambda: ToolCallReader(template, choice.callable, forced=choice.forced, most=most)  # noqa: E731
            ignored += [] if "tools" in template else ["tools (the chat template does not tell the model of them)"]
        if thoughts is not None and not self.separate_reasoning:
            thoughts = thoughts.left_in()
        return Understood(ChatPrompt(turns, tools, variables), config, reader, thoughts, ignored)

    def _variables(self, template: str) -> tuple[Mapping[str, Any], list[str]]:
        """For the chat template, and the names of options that have no effect on it."""
        given = dict(self.chat_template_kwargs)
        for name in ("enable_thinking", "reasoning_effort"):
            if getattr(self, name) is not None:
                given.setdefault(name, getattr(self, name))
        if taken := [name for name in given if name in _TAKEN]:
            raise ApiError(400, f"chat_template_kwargs: {taken[0]} is not to be set here", param="chat_template_kwargs")
        read = {name for name in given if re.search(rf"\b{re.escape(name)}\b", template)}
        ignored = [*self.ignored, *(name for name in given if name not in read)]
        ignored += details_of(self.messages)
        ignored += ["verbosity"] if self.verbosity not in (None, "medium") else []
        return {name: value for name, value in given.items() if name in read}, ignored


class PublishRequest(RequestBody):
    """`POST /v1/adapters`."""

    name: Annotated[str, Field(pattern=r"^\w[\w.:/@+-]{0,127}$")]
    path: Annotated[str, Field(min_length=1, max_length=4096)]


def refused(errors: Sequence[Any]) -> ApiError:
    """pydantic's findings as one refusal that names every option: of very many, the first."""
    broken = next((error for error in errors if error["type"] == "json_invalid"), None)
    if broken is not None:
        return ApiError(400, f"the body is not JSON: {broken.get('ctx', {}).get('error', broken['msg'])}")
    described_as, names = [], []
    for error in errors[:_MOST_PROBLEMS]:
        name = ".".join(str(part) for part in error["loc"] if part != "body")
        names.append(name)
        if error["type"] == "extra_forbidden":
            described_as.append(f"unsupported option: {name}")
        elif error["loc"]:
            described_as.append(f"{name or 'the body'}: {complaint([error])}")
        else:
            described_as.append(f"the body: {error['msg']}")
    if len(errors) > _MOST_PROBLEMS:
        described_as.append(f"and {len(errors) - _MOST_PROBLEMS:,} more")
    return ApiError(400, "; ".join(dict.fromkeys(described_as)), param=names[0] or None)


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
    raise ApiError(400, message + '{"name": ..., "schema": {...}}}', param="response_format")
