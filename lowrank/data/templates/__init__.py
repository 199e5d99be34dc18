"""Chat templates for bases that bring none: one .jinja file each, written from the public description of the format.

The `{% generation %}` blocks hold what the model says, its end of turn included. The comment in the first line names
the tokens a tokenizer must have; without them the model could never learn to stop. One file more, one template more.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lowrank.errors import ConfigError, ModelError, did_you_mean

_FOLDER = Path(__file__).parent
_FALLBACK = "alpaca"
"""Needs no token but EOS."""


def names() -> list[str]:
    """The built-in templates, by file name."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def required_tokens(text: str) -> list[str]:
    """The special tokens that the first line of a built-in template names."""
    found = re.match(r"\{#-.*Special tokens: (.*?) -#\}", text)
    assert found, "a built-in template says in its first line which special tokens it needs"
    return [] if found[1].startswith("none") else found[1].split()


def choose(tokenizer: Any, setting: str | None) -> str:
    """The text of the chat template to use: `setting` (a name or a .jinja file), else the tokenizer's own.

    Raises ConfigError for a name or file that does not exist, ModelError where there is no template, or the tokenizer
    lacks the tokens it is made of.
    """
    if setting is None:
        return _own(tokenizer)
    return _built_in(setting, tokenizer) if setting in names() else source_of(setting)


def source_of(setting: str) -> str:
    """The text of a built-in template, or of a .jinja file, whatever tokenizer it will meet. Raises ConfigError."""
    if setting in names():
        return _text(setting)
    path = Path(setting).expanduser()
    if path.suffix not in (".jinja", ".jinja2") and not path.is_file():
        raise ConfigError(
            f"data.chat_template: there is no template {setting!r}{did_you_mean(setting, names())}"
            f"\n  expected one of {', '.join(names())}, or a .jinja file"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template: cannot read {setting!r}: {error}") from error


def suitable(tokenizer: Any) -> str:
    """The built-in template whose special tokens this tokenizer has, else one that needs none."""
    for name in ("chatml", "llama3", "gemma", "phi3", "deepseek", "glm4"):
        if not _missing(_text(name), tokenizer):
            return name
    return _FALLBACK


def adds_bos(tokenizer: Any) -> bool:
    """The tokenizer puts BOS before plain text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _own(tokenizer: Any) -> str:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if own:
        return own
    raise ModelError(
        "this model's tokenizer has no chat template, so it does not say how a conversation is written\n"
        f"  set data.chat_template (chat: --chat-template) to one of {', '.join(names())}, or to a .jinja file; "
        f"{suitable(tokenizer)} is a good choice for this tokenizer"
    )


def _text(name: str) -> str:
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def _built_in(name: str, tokenizer: Any) -> str:
    text = _text(name)
    missing = _missing(text, tokenizer)
    if missing:
        raise ModelError(
            f"data.chat_template: {name} is made of special tokens that this tokenizer lacks: {', '.join(missing)}"
            f"\n  without them the model cannot learn to end its turn; use {suitable(tokenizer)}, or add the tokens"
        )
    if adds_bos(tokenizer) and "bos_token" not in text:
        text = "{{- bos_token }}\n" + text
    return text


def _missing(text: str, tokenizer: Any) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in required_tokens(text) if token not in vocabulary]
    if "eos_token" in text and tokenizer.eos_token is None:
        missing.append("EOS (the tokenizer names none)")
    return missing
