"""Chat templates for bases that bring none: one .jinja file each, written from the public description of the format.

The `{% generation %}` blocks hold what the model says, its end of turn included. The comment in the first line names
the tokens a tokenizer must have; without them the model could never learn to stop. One file more, one template more.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lowrank.data.templates import slots
from lowrank.errors import ConfigError, ModelError, did_you_mean

_FOLDER = Path(__file__).parent
_TOKENIZER_CONFIG = "tokenizer_config.json"
_FALLBACK = "alpaca"
"""Needs no token but EOS."""


def names() -> list[str]:
    """The built-in templates, by file name."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja") if not path.stem.startswith("_"))


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
    built_in = setting in names() or setting.startswith(slots.PREFIX)
    return _built_in(setting, tokenizer) if built_in else source_of(setting)


def source_of(setting: str) -> str:
    """The text of a built-in template, or of a .jinja file, whatever tokenizer it will meet. Raises ConfigError."""
    if setting in names() or setting.startswith(slots.PREFIX):
        return _text(setting)
    path = Path(setting).expanduser()
    if path.name == _TOKENIZER_CONFIG and path.is_file():
        return _in_tokenizer_config(path)
    if path.suffix not in (".jinja", ".jinja2") and not path.is_file():
        raise ConfigError(
            f"data.chat_template: there is no template {setting!r}{did_you_mean(setting, names())}"
            f"\n  expected one of {', '.join(names())}, or a .jinja file"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template: cannot read {setting!r}: {error}") from error


def has_template(path: Path) -> bool:
    """Whether the file exists and `source_of` finds a template in it."""
    try:
        return path.is_file() and bool(source_of(str(path)).strip())
    except ConfigError:
        return False


def _in_tokenizer_config(path: Path) -> str:
    """Its `chat_template`, the default one of several. Raises ConfigError."""
    try:
        own = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"data.chat_template: cannot read {str(path)!r}: {error}") from error
    if isinstance(own, list):
        own = next(
            (each.get("template") for each in own if isinstance(each, dict) and each.get("name") == "default"), None
        )
    if not isinstance(own, str):
        raise ConfigError(f"data.chat_template: {str(path)!r} has no chat template")
    return own


def suitable(tokenizer: Any) -> str:
    """The built-in template whose special tokens this tokenizer has, else one that needs none."""
    for name in ("chatml", "llama3", "paligemma", "gemma", "phi3", "deepseek", "glm4"):
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
    """With the tools that its format has none of its own for, in Hermes' way: schemas in the system prompt, calls and
    results as tagged text (`_tools.jinja`, before the first line that writes something)."""
    if name.startswith(slots.PREFIX):
        text = _by_slots(name)
    else:
        text = (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    if "tools" in text.partition("\n")[2]:
        return text
    first, _, rest = text.partition("\n")
    return first + "\n" + (_FOLDER / "_tools.jinja").read_text(encoding="utf-8") + rest


def _by_slots(setting: str) -> str:
    """A template of LLaMA-Factory's registry. Raises ConfigError."""
    name = setting.removeprefix(slots.PREFIX)
    if not slots.can_be_written(name):
        ours = [each for each in slots.registry() if slots.can_be_written(each)]
        raise ConfigError(
            f"data.chat_template: there is no template {setting!r}{did_you_mean(name, ours)}"
            f"\n  expected {slots.PREFIX} and one of {', '.join(ours)}"
        )
    return slots.jinja_of(name)


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
