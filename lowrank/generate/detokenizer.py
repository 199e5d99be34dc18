"""Incremental detokenization: text as tokens come, holding back what is not sure yet."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any


class IncrementalDetokenizer:
    """The text of one answer. Without a tokenizer there is none."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), preserved: Sequence[str] = ()) -> None:
        """`preserved`: control tokens that the text shows; it leaves out the others."""
        self.tokenizer = tokenizer
        self._hidden = hidden_tokens(tokenizer, preserved) if preserved and tokenizer is not None else None
        self._stops = [_StopText(text) for text in stop if text]
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
        """Of `text`, whose first part was held back: up to a stop text, or to what may become one."""
        if not self._stops:
            return text
        for place in range(len(self._held), len(text)):
            complete = [stop.text for stop in self._stops if stop.add(text[place])]
            if complete:
                self.stopped_by = max(complete, key=len)
                self._held = ""
                return text[: place + 1 - len(self.stopped_by)]
        cut = len(text) - max(stop.reached for stop in self._stops)
        self._held = text[cut:]
        return text[:cut]

    def _decode(self, tokens: list[int]) -> str:
        return decode(self.tokenizer, tokens, self._hidden)


def hidden_tokens(tokenizer: Any, preserved: Sequence[str]) -> dict[int, str] | None:
    """Control tokens that are not shown where `preserved` are; None if none of those is a control token."""
    special = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    hidden = {token: text for token, text in special.items() if text not in preserved}
    return hidden if len(hidden) < len(special) else None


def decode(tokenizer: Any, tokens: Sequence[int], hidden: Container[int] | None = None) -> str:
    """All of the tokens as one text, but for control tokens: those that are `hidden`, or (None) all."""
    if hidden is None:
        return tokenizer.decode(tokens, skip_special_tokens=True)
    return tokenizer.decode([token for token in tokens if token not in hidden], skip_special_tokens=False)


class _StopText:
    """How much of a stop text the answer ends with so far: constant time a character, however long the stop text is
    (Knuth, Morris and Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.reached = 0
        self._shorter = [0] * len(text)
        """The longest beginning of `text` that also ends its first n + 1 characters, but is not all of them."""
        length = 0
        for place in range(1, len(text)):
            while length and text[place] != text[length]:
                length = self._shorter[length - 1]
            length += text[place] == text[length]
            self._shorter[place] = length

    def add(self, letter: str) -> bool:
        """Whether the stop text is complete with this character."""
        while self.reached and (self.reached == len(self.text) or letter != self.text[self.reached]):
            self.reached = self._shorter[self.reached - 1]
        self.reached += letter == self.text[self.reached]
        return self.reached == len(self.text)
