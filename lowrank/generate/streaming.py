"""From tokens to text as they come, holding back what is not sure yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """The text of one answer. Without a tokenizer there is none."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(text for text in stop if text)
        self.stopped_by: str | None = None
        self._tokens: list[int] = []
        self._context = 0
        self._read = 0
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is sure after one token more. `stopped_by` is set when a stop text is complete."""
        if self.tokenizer is None:
            return ""
        self._tokens.append(token)
        # A few tokens of context decide about spaces and joined characters; the whole answer need not be read again.
        before = self._decode(self._tokens[self._context : self._read])
        now = self._decode(self._tokens[self._context :])
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._sure(self._held + now[len(before) :])

    def end(self) -> str:
        """What was held back, once no more tokens come."""
        if self.tokenizer is None or self.stopped_by is not None:
            return ""
        before = self._decode(self._tokens[self._context : self._read])
        rest = self._held + self._decode(self._tokens[self._context :])[len(before) :]
        self._held = ""
        return rest

    def _sure(self, text: str) -> str:
        found = [(place, stop) for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            place, self.stopped_by = min(found)
            self._held = ""
            return text[:place]
        most = max(map(len, self.stop), default=1) - 1
        held = next(
            (n for n in range(min(most, len(text)), 0, -1) if any(stop.startswith(text[-n:]) for stop in self.stop)), 0
        )
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
