"""Questions to a GGUF file as tokens: content is text, and control tokens are those of the chat template alone.

llama.cpp is asked to tokenize pieces; what only spells a control token is tokenized apart, so that nobody ends a turn
by typing `<|im_end|>`. BOS stands once, and no EOS behind a question.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from lowrank.data.chat.template import Rendered
from lowrank.export.gguf.header import read_header

_NAMED = ("bos", "eos", "unknown", "padding")
_CONTROL, _USER_DEFINED = 3, 4
"""llama.cpp's kinds of tokens."""
Tokenize = Callable[[str, bool], list[int]]
"""`(text, whether control tokens in it are read as such)`, without BOS and EOS."""


@dataclass(frozen=True)
class GgufTokens:
    """A file's added tokens, as far as a chat template has to know them; in transformers' words."""

    added_tokens_decoder: dict[int, Any]
    special_tokens_map: dict[str, str]
    name_or_path: str

    @property
    def all_special_tokens(self) -> list[str]:
        """Control tokens."""
        return [token.content for token in self.added_tokens_decoder.values() if token.special]

    def get_added_vocab(self) -> dict[str, int]:
        """Control tokens, and those that whoever made the file added."""
        return {token.content: index for index, token in self.added_tokens_decoder.items()}


def read_tokens(path: Path) -> GgufTokens:
    """From a file's header. ModelError if that is damaged."""
    header = read_header(path)
    kinds = _numbers(header.raw.get("tokenizer.ggml.token_type", b""), "tokenizer.ggml.token_type")
    texts = _strings(header.raw.get("tokenizer.ggml.tokens", b""), "tokenizer.ggml.tokens")
    added = {
        index: SimpleNamespace(content=text, special=kind == _CONTROL)
        for index, (text, kind) in enumerate(zip(texts, kinds))
        if kind in (_CONTROL, _USER_DEFINED)
    }
    named = {name: header.fields.get(f"tokenizer.ggml.{name}_token_id") for name in _NAMED}
    names = {"unknown": "unk", "padding": "pad"}
    special = {
        f"{names.get(name, name)}_token": texts[index]
        for name, index in named.items()
        if isinstance(index, int) and 0 <= index < len(texts)
    }
    return GgufTokens(added, special, path.name)


def frame_of(tokenize: Tokenize, framed: Callable[[str], list[int]]) -> list[int]:
    """What llama.cpp puts before a text by itself (BOS)."""
    bare, whole = tokenize("a", True), framed("a")
    places = [place for place in range(len(whole)) if whole[place : place + len(bare)] == bare]
    return whole[: places[0]] if places else []


def tokens_of(rendered: Rendered, frame: Sequence[int], known: GgufTokens, tokenize: Tokenize) -> list[int]:
    """A rendered conversation; `frame` before it unless the template wrote that itself."""
    text, found, at = rendered.text, [], 0
    for start, end in (*rendered.spelled, (len(text), len(text))):
        found += _within(tokenize, text[at:start], at > 0, True)
        if end > start:
            found += _as_text(tokenize, text[start:end], start > 0, known)
        at = end
    return found if found[: len(frame)] == list(frame) else [*frame, *found]


def _as_text(tokenize: Tokenize, spelled: str, within: bool, known: GgufTokens) -> list[int]:
    ids = _within(tokenize, spelled, within, False)
    if known.added_tokens_decoder.keys() & set(ids):  # llama.cpp reads tokens that were added to it in any text
        ids = [token for sign in spelled for token in _within(tokenize, sign, True, False)]
    return ids


def _within(tokenize: Tokenize, text: str, within: bool, control: bool) -> list[int]:
    """A piece of a longer text: behind a line break, so that no space is put before it as at the beginning of one."""
    if not text:
        return []
    if not within:
        return tokenize(text, control)
    lead, ids = tokenize("\n", control), tokenize("\n" + text, control)
    return ids[len(lead) :] if ids[: len(lead)] == lead else tokenize(text, control)


def _numbers(raw: bytes, name: str) -> list[int]:
    """Of a list of 32-bit integers in a header's bytes."""
    if not raw:
        return []
    at = 8 + len(name.encode()) + 4
    _kind, count = struct.unpack_from("<IQ", raw, at)
    return np.frombuffer(raw, "<i4", count, at + 12).tolist()


def _strings(raw: bytes, name: str) -> list[str]:
    """Of a list of texts in a header's bytes."""
    if not raw:
        return []
    at = 8 + len(name.encode()) + 4
    _kind, count = struct.unpack_from("<IQ", raw, at)
    at += 12
    found = []
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", raw, at)
        found.append(raw[at + 8 : at + 8 + length].decode("utf-8", "replace"))
        at += 8 + length
    return found
