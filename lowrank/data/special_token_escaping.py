"""Special tokens in the text of a conversation (a question, a tool's result, a tool's name) are read as text.

A chat template writes `<|im_end|>` and means the token; a person who types it means ten characters, or wants to end
the turn. So what is spelled out in the strings of a conversation is marked before it is rendered, found again in the
rendered text, and tokenized there as text. Strings without such a token are left as they are, and so are their tokens.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.errors import DataError

Span = tuple[int, int]
"""First character and the one after the last; empty where a mark stood alone, at which the text is only cut."""
_PRIVATE = range(0xF0000, 0xF2000, 2)
_TAG = re.compile(r"</?(?P<name>[A-Za-z_]+)>")


class SpecialTokenGuard:
    """Says what counts as a control token in the strings of conversations, for one tokenizer and chat template."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        """Control tokens are the tokenizer's special ones and those of its added tokens that the template writes. In
        what an assistant or a system prompt says, pairs of tags are none: `<think>` and `</think>` are its to say."""
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        written = {token.content for token in added if token.content in template}
        self.anywhere = _any_of(special | written)
        named = set(tokenizer.special_tokens_map.values()) if tokenizer.special_tokens_map else set()
        tags = {token: match["name"] for token in special | written if (match := _TAG.fullmatch(token))}
        pairs = {token for token, name in tags.items() if {f"<{name}>", f"</{name}>"} <= tags.keys()} - named
        self.in_answers = _any_of((special | written) - pairs)

    def pattern(self, role: str) -> re.Pattern[str]:
        """What counts as a control token in a turn of this role; `tools` is one for that."""
        return self.in_answers if role in ("assistant", "system") else self.anywhere


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    """The longest first; never what is only white space, which is ordinary text."""
    ordered = sorted((token for token in tokens if token.strip()), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def found_in(value: Any, pattern: re.Pattern[str]) -> bool:
    """Whether a string anywhere in `value` spells a control token; keys count."""
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, Mapping):
        return any(found_in(key, pattern) or found_in(item, pattern) for key, item in value.items())
    return isinstance(value, (list, tuple)) and any(found_in(item, pattern) for item in value)


def choose_marks(*values: Any) -> tuple[str, str]:
    """Two characters that stand nowhere in the values. DataError if all that could serve do."""
    whole = json.dumps(values, ensure_ascii=False, default=str)
    for code in _PRIVATE:
        if chr(code) not in whole and chr(code + 1) not in whole:
            return chr(code), chr(code + 1)
    raise DataError("it has thousands of different private characters, and control tokens spelled between them")


def mark(value: Any, pattern: re.Pattern[str], marks: tuple[str, str]) -> Any:
    """The same value with marks around every control token that its strings spell."""
    if isinstance(value, str):
        return pattern.sub(rf"{marks[0]}\g<0>{marks[1]}", value)
    if isinstance(value, Mapping):
        return {mark(key, pattern, marks): mark(item, pattern, marks) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mark(item, pattern, marks) for item in value]
    return value


def unmark(
    text: str, blocks: Sequence[Span], pattern: re.Pattern[str], marks: tuple[str, str]
) -> tuple[str, tuple[Span, ...], tuple[Span, ...]]:
    """A rendered text without its marks, its blocks, and where spelled tokens stand."""
    for each in marks:
        text = text.replace(json.dumps(each)[1:-1], each)  # a template may write JSON in ASCII
    first, last = marks
    parts: list[str] = []
    spans: list[Span] = []
    removed: list[int] = []
    at = length = 0
    for match in re.finditer(rf"{first}({pattern.pattern}){last}|[{first}{last}]", text):
        before, token = text[at : match.start()], match[1] or ""
        parts += (before, token)
        length += len(before)
        spans.append((length, length + len(token)))
        length += len(token)
        removed += [match.start()] if not token else [match.start(), match.end() - 1]
        at = match.end()
    moved = tuple((start - bisect_left(removed, start), end - bisect_left(removed, end)) for start, end in blocks)
    return "".join([*parts, text[at:]]), moved, tuple(spans)


@dataclass(frozen=True)
class _Piece:
    start: int
    first: int
    count: int
    encoding: Any = None
    lead: int = 0
    skipped: int = 0

    def token_at(self, place: int) -> int | None:
        """The token of a character, counted from the piece's beginning."""
        if self.encoding is None:
            return None if not self.count else self.first + (0 if place == 0 else self.count - 1)
        token = self.encoding.char_to_token(place + self.lead)
        return None if token is None or token < self.skipped else self.first + token - self.skipped


class EscapedEncoding:
    """The encoding of a text whose `spelled` control tokens are encoded as text. It has what is used here of
    `tokenizers.Encoding`: `ids` and `char_to_token`."""

    def __init__(self, tokenizer: Any, text: str, spelled: Sequence[Span]) -> None:
        self.ids: list[int] = []
        self._pieces: list[_Piece] = []
        at = 0
        for start, end in (*spelled, (len(text), len(text))):
            self._add(tokenizer, text[at:start], at)
            if end > start:
                self._add_spelled(tokenizer, text[start:end], start)
            at = end
        self._starts = [piece.start for piece in self._pieces]

    def char_to_token(self, place: int) -> int | None:
        """The token that a character belongs to; None for white space of none."""
        piece = self._pieces[bisect_right(self._starts, place) - 1] if self._pieces else None
        return None if piece is None else piece.token_at(place - piece.start)

    def _add(self, tokenizer: Any, text: str, start: int) -> None:
        if not text:
            return
        lead, skipped = ("", 0) if start == 0 else ("\n", len(_encode(tokenizer, "\n").ids))
        encoding = _encode(tokenizer, lead + text)
        if lead and encoding.ids[:skipped] != _encode(tokenizer, lead).ids:  # it melts with what follows
            lead, skipped, encoding = "", 0, _encode(tokenizer, text)
        ids = encoding.ids[skipped:]
        self._pieces.append(_Piece(start, len(self.ids), len(ids), encoding, len(lead), skipped))
        self.ids += ids

    def _add_spelled(self, tokenizer: Any, token: str, start: int) -> None:
        ids = _as_text(tokenizer.backend_tokenizer, token, start > 0)
        special = {*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids(token)} - {tokenizer.unk_token_id}
        if special & set(ids):
            ids = [each for sign in token for each in _as_text(tokenizer.backend_tokenizer, sign, True)]
        if special & set(ids):
            raise DataError(f"it spells {token!r}, which this tokenizer cannot read as anything but the token")
        self._pieces.append(_Piece(start, len(self.ids), len(ids)))
        self.ids += ids


def _encode(tokenizer: Any, text: str) -> Any:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)


def _as_text(backend: Any, text: str, within: bool) -> list[int]:
    """Through normalizer, pre-tokenizer and model, past the added tokens. `within` a text: behind a line break, so
    that no space is put before it as at the beginning of one."""
    lead = _without_added(backend, "\n") if within else []
    ids = _without_added(backend, "\n" + text if within else text)
    return ids[len(lead) :] if ids[: len(lead)] == lead else _without_added(backend, text)


def _without_added(backend: Any, text: str) -> list[int]:
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    pre_tokens = (
        [text]
        if backend.pre_tokenizer is None
        else [pre_token for pre_token, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    )
    return [token.id for pre_token in pre_tokens for token in backend.model.tokenize(pre_token)]
