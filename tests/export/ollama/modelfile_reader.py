"""A strict reader of Modelfiles: Ollama's documented grammar, character by character, with the errors it gives."""

from __future__ import annotations

import unicodedata

COMMANDS = {
    "from",
    "license",
    "template",
    "system",
    "adapter",
    "renderer",
    "parser",
    "parameter",
    "message",
    "requires",
}
DEPRECATED = {
    "penalize_newline", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock", "mirostat", "mirostat_tau",
    "mirostat_eta",
}  # fmt: skip
NUMBERS = {"num_ctx": int, "temperature": float, "top_p": float, "top_k": int}


class WrongModelfile(Exception):
    """What Ollama would answer."""


def read(text: str) -> list[tuple[str, str]]:
    """(command or parameter, value) in order."""
    found: list[tuple[str, str]] = []
    state, name, buffer = "between", "", ""
    for char in [*text, None]:
        if state == "between":
            if char is None or char in " \t\r\n":
                continue
            state, buffer = ("comment", "") if char == "#" else ("name", char)
        elif state == "comment":
            if char is not None and char in "\r\n":
                state = "between"
        elif state in ("name", "parameter"):
            allowed = (
                char is not None
                and char.isascii()
                and (char.isalpha() or (state == "parameter" and (char.isdigit() or char == "_")))
            )
            if allowed:
                buffer += str(char)
            elif char in (" ", "\t"):
                if state == "name" and buffer.lower() not in COMMANDS:
                    raise WrongModelfile(f"{buffer}: no command")
                name = buffer if state == "parameter" else buffer.lower()
                state, buffer = ("parameter" if name == "parameter" and state == "name" else "value"), ""
            else:
                raise WrongModelfile(f"{buffer}: {char!r} in a name")
        elif char is None or char in "\r\n":
            value = _closed(buffer.strip())
            if value is None:
                if char is None:
                    raise WrongModelfile("the file ends within quotes")
                buffer += char
                continue
            if name in DEPRECATED:
                raise WrongModelfile(f"{name} is deprecated")
            if name in NUMBERS:
                NUMBERS[name](value)
            found.append((name, value))
            state, buffer = "between", ""
        elif char in " \t" or unicodedata.category(char)[0] in "LMNPS":  # what Go calls printable; all else is dropped
            buffer += char
    if state in ("name", "parameter"):
        raise WrongModelfile("the file ends within a command")
    if not any(name == "from" for name, _ in found):
        raise WrongModelfile("no FROM line")
    return found


def _closed(text: str) -> str | None:
    if text.startswith('"""'):
        return text[3:-3] if len(text) >= 6 and text.endswith('"""') else None
    if text.startswith('"'):
        return text[1:-1] if len(text) >= 2 and text.endswith('"') else None
    return text
