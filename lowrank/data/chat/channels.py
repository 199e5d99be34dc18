"""Answers in channels, as gpt-oss writes them (OpenAI's harmony): several messages, each with a header.

    <|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Four.
     to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}

What stands in `analysis` is thought, a message to a tool is a call of it, and all else is said to the person. The marks
are control tokens, which an answer's text leaves out unless it is asked to keep them (`preserved_tokens`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowrank.data.chat.overlap import overlap

SIGN = "<|channel|>"
"""What templates of this kind have in them."""
_MESSAGE, _END, _START = "<|message|>", "<|end|>", "<|start|>"
_ENDS = (_END, _START, SIGN)
"""What ends a message; the last two where its own end was forgotten."""
_TO = re.compile(r"to=(?:functions\.)?([\w.-]{1,256})")
_BEGINNINGS = (SIGN, _START, "to=")
_LONGEST_HEADER = 1024


@dataclass(frozen=True)
class Channels:
    """How a model of such a template thinks and answers."""

    aloud: bool = False
    """Thoughts stay in the text, between `<think>` tags."""
    marks: tuple[str, ...] = (SIGN, _MESSAGE, _END, _START)

    def reader(self) -> ChannelReader:
        """For one answer."""
        return ChannelReader(self.aloud)

    def left_in(self) -> Channels:
        """The same, with its thoughts in the text."""
        return Channels(aloud=True)

    def before(self, form: Mapping[str, Any]) -> dict[str, Any]:
        """A form to keep (`json_schema` or `grammar` of GenerationConfig), which is the whole answer."""
        return dict(form)


class ChannelReader:
    """Takes an answer in pieces; gives back what is thought and what is said, without the marks.

    A call comes as `<tool_call>` with JSON in it, which tool_calls.py reads.
    """

    def __init__(self, aloud: bool = False) -> None:
        self._aloud = aloud
        self._held = ""
        self._reading: str | None = None
        """The kind of message: thought, said, or a call of the tool `_tool`; None within a header."""
        self._tool = ""
        self._call: list[str] = []
        self._bare = False
        """The answer has no headers at all, and is taken as it is."""
        self._last: str | None = None
        """Of what was given back: thought or said."""
        self._thoughts: list[str] = []
        self._spoke = False

    def add(self, text: str) -> tuple[str, str]:
        """The thought and the answer that are sure now."""
        self._held += text
        return self._collected(self._read())

    def end(self, *, whole: bool = False) -> tuple[str, str]:
        """What is left. `whole`: the model itself ended its answer, so what it only thought is what it says."""
        held, self._held = self._held, ""
        parts: list[tuple[str, str]] = []
        if self._reading is not None:
            parts = [*self._piece(held), *self._called()]
        elif self._last is None:  # nothing but a header: rather that than nothing
            parts = [("content", held)]
        thought, content = self._collected(parts)
        if self._aloud and self._last == "reasoning":
            content += "\n</think>\n\n"
        if whole and not self._spoke:
            content = "".join(self._thoughts)
        return thought, content

    def _read(self) -> Iterator[tuple[str, str]]:
        while self._held:
            if self._reading is None and not self._header():
                return
            ends = [] if self._bare else [at for mark in _ENDS if (at := self._held.find(mark)) >= 0]
            if not ends:
                unsure = 0 if self._bare else max(overlap(self._held, mark) for mark in _ENDS)
                sure = len(self._held) - unsure
                text, self._held = self._held[:sure], self._held[sure:]
                yield from self._piece(text)
                return
            at = min(ends)
            text, self._held = self._held[:at], self._held[at:].removeprefix(_END)
            yield from self._piece(text)
            yield from self._called()
            self._reading = None

    def _header(self) -> bool:
        """Whether it is known what kind of message comes. A whole header is taken off."""
        begun = self._held.lstrip()
        if not any(begun.startswith(mark) or mark.startswith(begun) for mark in _BEGINNINGS):
            self._reading, self._bare = "content", self._last is None
            return True
        head, mark, rest = self._held.partition(_MESSAGE)
        if not mark:
            if len(self._held) > _LONGEST_HEADER:
                self._reading, self._bare = "content", True
            return self._bare
        to = _TO.search(head)
        channel = head.rpartition(SIGN)[2].lstrip() if SIGN in head else ""
        self._reading = "call" if to else "reasoning" if channel.startswith("analysis") else "content"
        self._tool, self._held = to[1] if to else "", rest
        return True

    def _piece(self, text: str) -> Iterator[tuple[str, str]]:
        if self._reading == "call":
            self._call.append(text)
        elif text and self._reading is not None:
            yield self._reading, text

    def _called(self) -> Iterator[tuple[str, str]]:
        if self._reading != "call":
            return
        written, self._call = "".join(self._call).strip(), []
        try:
            arguments = json.loads(written or "{}")
        except (ValueError, RecursionError):
            arguments = written
        call = json.dumps({"name": self._tool, "arguments": arguments}, ensure_ascii=False)
        yield "content", f"<tool_call>\n{call}\n</tool_call>"

    def _collected(self, parts: Iterable[tuple[str, str]]) -> tuple[str, str]:
        thought, content = "", ""
        for kind, text in parts:
            if self._aloud:
                if kind != self._last and kind == "reasoning":
                    content += "<think>\n"
                elif kind != self._last == "reasoning":
                    content += "\n</think>\n\n"
                content += text
            elif kind == "reasoning":
                thought += text
                self._thoughts.append(text)
            else:
                content += text
            self._spoke = self._spoke or self._aloud or kind == "content"
            self._last = kind
        return thought, content
