"""`POST /v1/responses` in a thin form: a chat in other words. Nothing is kept, so every request brings all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from lowrank.serve.api.generation_request import GenerationRequest, Json
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.api.requests import ChatRequest, RequestBody, refused
from lowrank.serve.api.responses_reply import ResponsesReply
from lowrank.serve.engine import ServeEngine
from lowrank.serve.limits import RequestLimits

_NOT_KEPT = "nothing is kept here between requests; send the whole conversation as input"


class TextOptions(RequestBody):
    """The form of the answer."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ReasoningOptions(RequestBody):
    """How much a model may think."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesRequest(RequestBody):
    """What OpenAI defines, without what needs a server that keeps things or has tools of its own."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    max_tool_calls: int | None = None
    text: TextOptions = Field(default_factory=TextOptions)
    reasoning: ReasoningOptions = Field(default_factory=ReasoningOptions)
    include: list[str] = Field(default_factory=list)
    truncation: Literal["auto", "disabled"] = "disabled"
    background: Literal[False] = False
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    enable_thinking: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None

    def generation_request(self, engine: ServeEngine, limits: RequestLimits) -> GenerationRequest:
        """As a chat."""
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                raise ApiError(400, f"unsupported option: {name}: {_NOT_KEPT}", param=name)
        if isinstance(self.input, list) and len(self.input) > limits.messages_per_request:
            message = f"{len(self.input)} items in one request; this server reads {limits.messages_per_request}"
            raise ApiError(400, message, param="input")
        chat = self._chat().understood(engine, limits)
        reply = ResponsesReply(self.model, self._echo(), chat.reader() if chat.reader else None, chat.thoughts)
        ignored = (*chat.ignored, *self._ignored())
        return GenerationRequest(self.model, [chat.question], chat.config, 1, self.stream, reply, ignored)

    def _ignored(self) -> list[str]:
        found = [f"include {name}" for name in self.include]
        found += ["truncation"] if self.truncation == "auto" else []
        found += ["reasoning.summary"] if self.reasoning.summary or self.reasoning.generate_summary else []
        found += ["max_tool_calls"] if self.max_tool_calls is not None else []
        if isinstance(self.input, list) and any(item.get("type") == "reasoning" for item in self.input):
            found.append("reasoning items")
        return found

    def _chat(self) -> ChatRequest:
        same = ("model", "temperature", "top_p", "tool_choice", "parallel_tool_calls", "store", "service_tier")
        given: Json = {name: getattr(self, name) for name in (*same, "chat_template_kwargs", "enable_thinking")}
        given |= {"max_completion_tokens": self.max_output_tokens, "tools": [_tool(each) for each in self.tools]}
        given |= {"verbosity": self.text.verbosity, "reasoning_effort": self.reasoning.effort}
        given |= {"messages": self._messages(), "response_format": _format(self.text.format)}
        try:
            return ChatRequest.model_validate(given)
        except ValidationError as error:
            raise refused(error.errors(include_url=False)) from error

    def _messages(self) -> list[Json]:
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        messages: list[Json] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        for number, item in enumerate(items):
            message = _message(item, f"input[{number}]")
            before = messages[-1] if messages else None
            if message is None:
                continue
            if before is not None and "tool_calls" in message and before["role"] == "assistant":
                before.setdefault("tool_calls", []).extend(message["tool_calls"])
            elif before is not None and number == 0 and message["role"] in ("system", "developer"):
                before["content"] += f"\n\n{_text_of(message['content'])}"  # templates know one system turn
            else:
                messages.append(message)
        return messages

    def _echo(self) -> Json:
        """What a response repeats of its request."""
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": self.reasoning.effort, "summary": None},
            "store": False,
            "temperature": self.temperature,
            "text": {"format": self.text.format or {"type": "text"}},
            "tool_choice": self.tool_choice or "auto",
            "tools": self.tools,
            "top_p": self.top_p,
            "truncation": self.truncation,
            "user": self.user,
        }


def _message(item: Json, where: str) -> Json | None:
    """An item of the input as a message of a chat; None for thoughts, which no template takes back."""
    kind = item.get("type", "message")
    if kind == "message":
        content = item.get("content")
        return {"role": item.get("role"), "content": _parts(content) if isinstance(content, list) else content}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind == "function_call_output":
        output = item.get("output")
        content = _parts(output) if isinstance(output, list) else output
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
    if kind == "reasoning":
        return None
    raise ApiError(400, f"{where}: unsupported item {str(kind)[:60]!r}: {_NOT_KEPT}", param="input")


def _parts(parts: list[Any]) -> list[Any]:
    return [_part(part) if isinstance(part, Mapping) else part for part in parts]


def _part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part in a chat's words. A picture by the number of a kept file stays as it is, and is refused by its name."""
    if part.get("type") in ("input_text", "output_text", "text"):
        return {"type": "text", "text": part.get("text")}
    if part.get("type") == "input_image" and part.get("file_id") is None and part.get("image_url") is not None:
        return {"type": "image_url", "image_url": {"url": part["image_url"], "detail": part.get("detail")}}
    return part


def _text_of(content: Any) -> str:
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, Mapping))


def _tool(tool: Json) -> Json:
    if tool.get("type") != "function":
        raise ApiError(
            400, f"unsupported tool {str(tool.get('type'))[:60]!r}: only functions are called", param="tools"
        )
    if "function" in tool:
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _format(given: Json | None) -> Json | None:
    if given is None or given.get("type") != "json_schema" or "json_schema" in given:
        return given
    return {"type": "json_schema", "json_schema": {key: value for key, value in given.items() if key != "type"}}
