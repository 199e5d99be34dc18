"""The reply of `/v1/responses`: output items, whole or as the events that build them."""

from __future__ import annotations

import json
import time
import uuid

from lowrank.data.chat.thoughts import Thinking
from lowrank.generate.request import TokenChunk
from lowrank.serve.api.generation_request import Json
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.api.replies import Choice
from lowrank.serve.api.tool_calls import ToolCallReader


class ResponsesReply:
    """One answer as what was thought, a message, and function calls."""

    media_type = "text/event-stream"
    ending = ""

    def __init__(self, model: str, echo: Json, reader: ToolCallReader | None, thoughts: Thinking | None = None) -> None:
        """`echo`: what is repeated of the request."""
        self._head = {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time())}
        self._model, self._echo = model, echo
        self._choice = Choice(reader, thoughts)
        self._thinking = False
        self._thought_id = f"rs_{uuid.uuid4().hex}"
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._open = False
        self._sent = 0
        self._output: list[Json] = []

    def write(self, event: Json) -> str:
        """As a named event."""
        return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"

    def opening(self) -> list[Json]:
        """A response that has nothing yet."""
        return [
            self._event(kind, response=self._response("in_progress"))
            for kind in ("response.created", "response.in_progress")
        ]

    def add(self, index: int, chunk: TokenChunk) -> list[Json]:
        """The events that one chunk makes."""
        text = self._choice.add(chunk)
        events: list[Json] = []
        if thought := self._choice.fresh_thought:
            events += [] if self._thinking else self._begin_thought()
            place = {"item_id": self._thought_id, "output_index": 0, "content_index": 0}
            events.append(self._event("response.reasoning_text.delta", **place, delta=thought))
        if self._thinking and (text or self._choice.finish is not None):
            events += self._end_thought()
        if text:
            events += [] if self._open else self._begin_message()
            events.append(self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[]))
        if self._choice.finish is not None:
            if not self._open and not self._choice.calls:
                events += self._begin_message()
            events += self._end_message() if self._open else []
            for call in self._choice.calls:
                events += self._call(call)
        return events

    def closing(self, counts: Json | None) -> list[Json]:
        """The whole response."""
        return [self._event(f"response.{self._status}", response=self._response(self._status, counts))]

    def whole(self, counts: Json) -> Json:
        """After all chunks."""
        return self._response(self._status, counts)

    def failed(self, refusal: ApiError) -> list[Json]:
        """A response that failed."""
        code = "rate_limit_exceeded" if refusal.status == 429 else "server_error"
        error = {"code": code, "message": refusal.message}
        return [self._event("response.failed", response=self._response("failed") | {"error": error})]

    @property
    def _status(self) -> str:
        return "incomplete" if self._choice.finish == "length" else "completed"

    def _response(self, status: str, counts: Json | None = None) -> Json:
        why = {"reason": "max_output_tokens"} if status == "incomplete" else None
        shown = {"status": status, "error": None, "incomplete_details": why, "model": self._model}
        return {**self._head, **shown, "output": list(self._output), **self._echo, "usage": _usage(counts)}

    def _event(self, kind: str, **content: object) -> Json:
        self._sent += 1
        return {"type": kind, "sequence_number": self._sent - 1, **content}

    def _begin_thought(self) -> list[Json]:
        self._thinking = True
        return [self._event("response.output_item.added", output_index=0, item=self._thought("in_progress", []))]

    def _end_thought(self) -> list[Json]:
        self._thinking, text = False, self._choice.thought
        item = self._thought("completed", [{"type": "reasoning_text", "text": text}])
        self._output.append(item)
        place = {"item_id": self._thought_id, "output_index": 0, "content_index": 0}
        return [
            self._event("response.reasoning_text.done", **place, text=text),
            self._event("response.output_item.done", output_index=0, item=item),
        ]

    def _thought(self, status: str, content: list[Json]) -> Json:
        return {"id": self._thought_id, "type": "reasoning", "summary": [], "content": content, "status": status}

    def _place(self) -> Json:
        """Of the message, while it is built."""
        return {"item_id": self._message_id, "output_index": len(self._output), "content_index": 0}

    def _begin_message(self) -> list[Json]:
        self._open = True
        item = self._message("in_progress", [])
        return [
            self._event("response.output_item.added", output_index=len(self._output), item=item),
            self._event("response.content_part.added", **self._place(), part=_part("")),
        ]

    def _end_message(self) -> list[Json]:
        text, place = self._choice.text, self._place()
        item = self._message(self._status, [_part(text)])
        self._output.append(item)
        return [
            self._event("response.output_text.done", **place, text=text, logprobs=[]),
            self._event("response.content_part.done", **place, part=_part(text)),
            self._event("response.output_item.done", output_index=place["output_index"], item=item),
        ]

    def _message(self, status: str, content: list[Json]) -> Json:
        return {"id": self._message_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _call(self, call: Json) -> list[Json]:
        function, number = call["function"], len(self._output)
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call["id"]}
        item |= {"name": function["name"], "arguments": function["arguments"], "status": "completed"}
        self._output.append(item)
        place = {"item_id": item["id"], "output_index": number}
        begun = {**item, "arguments": "", "status": "in_progress"}
        arguments, name = function["arguments"], function["name"]
        return [
            self._event("response.output_item.added", output_index=number, item=begun),
            self._event("response.function_call_arguments.delta", **place, delta=arguments),
            self._event("response.function_call_arguments.done", **place, name=name, arguments=arguments),
            self._event("response.output_item.done", output_index=number, item=item),
        ]


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(counts: Json | None) -> Json | None:
    if counts is None:
        return None
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": counts["prompt_tokens_details"]["cached_tokens"]},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts["total_tokens"],
    }
