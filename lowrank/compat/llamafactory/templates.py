"""`template` of a LLaMA-Factory file: a built-in template, or the tokenizer's own where it writes the same text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from lowrank.data import templates
from lowrank.data.chat import template_sandbox
from lowrank.data.templates import slots
from lowrank.errors import ConfigError, did_you_mean
from lowrank.models.packaged import locate

TEMPLATES = {
    "alpaca": "alpaca",
    "chatml": "chatml",
    "deepseek3": "deepseek",
    "gemma": "gemma",
    "gemma3": "gemma",
    "llama3": "llama3",
    "mistral": "mistral",
    "paligemma": "paligemma",
    "phi": "phi3",
    "qwen": "qwen",
}
"""Templates of theirs that a built-in one reproduces, by name; `deepseek` means another format there."""

_TURNS = [("What is 2 + 2?", "It is 4."), ("And 3 more?", "It is 7.")]
_SYSTEM = "You are kind."
_NO_THOUGHT = ("<think>\n\n</think>\n\n", "<think></think>\n", "</think>\n")


@dataclass(frozen=True)
class TemplateChoice:
    """`setting`: for `data.chat_template`, None: the tokenizer's own. `note`: what the person should know."""

    setting: str | None
    note: str | None = None


def choose(name: str, model: str) -> TemplateChoice:
    """What stands for their template `name` on the tokenizer of `model` (a folder or hub name). ConfigError for a name
    that is not in their registry."""
    if name in TEMPLATES:
        return TemplateChoice(TEMPLATES[name])
    if name not in slots.registry():
        raise ConfigError(
            f"template: {name!r} is none of LLaMA-Factory's{did_you_mean(name, slots.registry())}; left out, the "
            "tokenizer's own chat template is used"
        )
    written = slots.PREFIX + name if slots.can_be_written(name) else None
    if written and slots.registry()[name].get("replaces"):
        return TemplateChoice(written)
    tokenizer = _find_tokenizer(model)
    if tokenizer is None:
        text = f"template: {model} is not on this machine yet, so {name!r} was not compared with its own chat template"
        return TemplateChoice(None, f"{text}, which is used")
    if tokenizer.template is None:
        missing = f"template: {name!r} is not built in, and the tokenizer of {model} has no chat template"
        return TemplateChoice(written, None if written else missing)
    if differing := _difference(name, tokenizer):
        way = f"; data.chat_template={written} writes it as there" if written else ""
        text = f"template: {name!r} is not built in, and {model}'s own chat template, which is used, differs"
        return TemplateChoice(None, f"{text} ({differing}){way}")
    return TemplateChoice(None)


@dataclass(frozen=True)
class _Tokenizer:
    template: str | None
    special: Mapping[str, str]


def _find_tokenizer(model: str) -> _Tokenizer | None:
    """What the files of a model say, without downloading any; None where they are not there."""
    files = {name: _find(model, name) for name in ("chat_template.jinja", "tokenizer_config.json")}
    place = files["tokenizer_config.json"]
    if place is None:
        return None
    try:
        config = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    special = {key: _text_of(config.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    known = {key: value for key, value in special.items() if value is not None}
    for file in files.values():
        if file is not None and templates.has_template(file):
            return _Tokenizer(templates.source_of(str(file)), known)
    return _Tokenizer(None, known)


def _find(model: str, name: str) -> Path | None:
    folder = Path(locate(model)).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        found = try_to_load_from_cache(model, name)
    except ValueError:  # no name that the hub could have
        return None
    return Path(found) if isinstance(found, str) else None


def _text_of(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _difference(name: str, tokenizer: _Tokenizer) -> str | None:
    """How the two write test conversations: None where it is the same but for BOS at the beginning, what comes after
    the last answer, and a thought that is empty."""
    for what, turns, system in (
        ("a question and an answer", _TURNS[:1], ""),
        ("a system prompt", _TURNS[:1], _SYSTEM),
        ("a second question", _TURNS, ""),
    ):
        theirs = slots.written_text(
            name, turns, system, tokenizer.special.get("bos_token", ""), tokenizer.special.get("eos_token", "")
        )
        own = _render(tokenizer, turns, system)
        if own is None:
            return f"{what} is refused"
        if _compared(own, tokenizer) != _compared(theirs, tokenizer):
            return f"{what} is written otherwise"
    return None


def _render(tokenizer: _Tokenizer, turns: list[tuple[str, str]], system: str) -> str | None:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert tokenizer.template is not None
    try:
        return template_sandbox.render(
            tokenizer.template, messages=messages, tools=None, generation_prompt=False, variables=tokenizer.special
        )[0]
    except Exception:  # whatever a stranger's template does to itself, it does not write this conversation
        return None


def _compared(text: str, tokenizer: _Tokenizer) -> str:
    for thought in _NO_THOUGHT:
        text = text.replace(thought, "")
    text = text.removeprefix(tokenizer.special.get("bos_token", ""))
    return text.rstrip().removesuffix(tokenizer.special.get("eos_token", "")).rstrip()
