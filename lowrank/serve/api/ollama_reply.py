"""Replies in Ollama's form: one JSON object, or one a line."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone

from lowrank.data.chat.thoughts import Thinking
from lowrank.generate.request import TokenChunk
from lowrank.serve.api.generation_request import Json
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.api.replies import Choice
from lowrank.serve.api.tool_calls import ToolCallReader


class OllamaReply:
    """One answer. `wrap`: `message` of a chat, or `response` of a prompt."""

    media_type = "application/x-ndjson"
    ending = ""

    def __init__(self, model: str, wrap: str, reader: ToolCallReader | None, thoughts: Thinking | None) -> None:
        self._model, self._wrap = model, wrap
        self._choice = Choice(reader, thoughts)
        self._began = time.monotonic_ns()
        self._first: int | None = None

    def write(self, event: Json) -> str:
        """As a line."""
        return json.dumps(event, ensure_ascii=False) + "\n"

    def opening(self) -> list[Json]:
        """Nothing."""
        return []

    def add(self, index: int, chunk: TokenChunk) -> list[Json]:
        """A line where there is text."""
        self._first = self._first or time.monotonic_ns()
        text = self._choice.add(chunk)
        thought = self._choice.fresh_thought
        return [self._line(text, [], thought, done=False)] if text or thought else []

    def closing(self, counts: Json | None) -> list[Json]:
        """The calls and the counts."""
        calls = [self._line("", self._choice.calls, done=False)] if self._choice.calls else []
        return [*calls, self._line("", [], done=True) | self._counted(counts or {})]

    def whole(self, counts: Json) -> Json:
        """After all chunks."""
        choice = self._choice
        thought = "" if choice.only_thought else choice.thought
        return self._line(choice.text, choice.calls, thought, done=True) | self._counted(counts)

    def failed(self, refusal: ApiError) -> list[Json]:
        """As Ollama tells of it."""
        return [{"error": refusal.message}]

    def _line(self, text: str, calls: list[Json], thought: str = "", *, done: bool) -> Json:
        head = {"model": self._model, "created_at": datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")}
        if self._wrap == "response":
            return {**head, "response": text, **({"thinking": thought} if thought else {}), "done": done}
        message: Json = {"role": "assistant", "content": text}
        if thought:
            message["thinking"] = thought
        if calls:
            message["tool_calls"] = [_call(number, call) for number, call in enumerate(calls)]
        return {**head, "message": message, "done": done}

    def _counted(self, counts: Json) -> Json:
        """Durations in nanoseconds."""
        now = time.monotonic_ns()
        first = self._first or now
        return {
            "done_reason": "length" if self._choice.finish == "length" else "stop",
            "total_duration": now - self._began,
            "load_duration": 0,
            "prompt_eval_count": counts.get("prompt_tokens", 0),
            "prompt_eval_duration": first - self._began,
            "eval_count": counts.get("completion_tokens", 0),
            "eval_duration": now - first,
        }


def _call(number: int, call: Json) -> Json:
    """Arguments are an object here, and a text in OpenAI's form."""
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        arguments = {"": function["arguments"]}
    return {"id": call["id"], "function": {"index": number, "name": function["name"], "arguments": arguments}}
