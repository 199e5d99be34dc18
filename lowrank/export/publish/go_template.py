"""A chat template in Go's template language, for Ollama before 0.30: made from what the Jinja template writes.

The Jinja template is tried on conversations with known contents; what stands between the contents is constant in most
templates, and is all that Go's needs. It is then compared with the original on further conversations, and refused where
it differs. Tool calls cannot be carried over this way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lowrank.errors import ModelError
from lowrank.export.publish.modelfile import printable

Turns = Sequence[tuple[str, str]]
"""(role, content) of each."""
Render = Callable[[Turns, bool], str]
"""A conversation as the model was trained on it; whether it ends in the beginning of an answer."""

_WAY_OUT = "leave ollama.template out (Ollama 0.30 and later use the chat template in the GGUF file)"
_SYSTEM, _QUESTION, _ANSWER, _SECOND_QUESTION, _ANSWER_AGAIN = "qsystemq", "qaskedq", "qanswerq", "qagainq", "qlaterq"


@dataclass(frozen=True)
class TurnTexts:
    """The constant text of a chat template."""

    without_system: str
    """At the beginning of a conversation that has no system prompt."""
    system: tuple[str, str]
    """Before and after the system prompt."""
    user: tuple[str, str]
    answer: tuple[str, str]
    """Of an answer that was given: before it and after it."""
    waiting: str
    """Where the next answer is to begin; often what stands before the others too, and then empty here and there."""

    def render(self, turns: Turns) -> str:
        """What `go()` gives, ending in the beginning of an answer unless the last turn is one."""
        text = "" if any(role == "system" for role, _ in turns) else self.without_system
        for role, content in turns:
            before, after = {"system": self.system, "user": self.user, "assistant": self.answer}[role]
            text += before + content + after
        return text + self.waiting if turns[-1][0] == "user" else text.removesuffix(self.answer[1])

    def go(self) -> str:
        """The template's source."""
        return (
            f"{{{{- if not .System }}}}{_rendered(self.without_system)}{{{{- end }}}}\n"
            "{{- range $i, $_ := .Messages }}\n"
            "{{- $last := eq (len (slice $.Messages $i)) 1 }}\n"
            f'{{{{- if eq .Role "system" }}}}{_around(self.system)}\n'
            f'{{{{- else if eq .Role "user" }}}}{_around(self.user)}{{{{- if $last }}}}{_rendered(self.waiting)}'
            "{{- end }}\n"
            f'{{{{- else if eq .Role "assistant" }}}}{_rendered(self.answer[0])}{{{{- .Content }}}}'
            f"{{{{- if not $last }}}}{_rendered(self.answer[1])}{{{{- end }}}}\n"
            "{{- end }}\n"
            "{{- end }}"
        )


def turn_texts(render: Render, bos: str | None) -> TurnTexts:
    """The constant text of a template. BOS at the beginning is left out, since Ollama's runner puts it there.

    Raises ModelError where the template does more than put text around what is said.
    """

    def text(turns: Turns, waiting: bool = False) -> str:
        return render(turns, waiting).removeprefix(bos or "")

    whole = [("system", _SYSTEM), ("user", _QUESTION), ("assistant", _ANSWER), ("user", _SECOND_QUESTION),
             ("assistant", _ANSWER_AGAIN)]  # fmt: skip
    pieces, rest = [], text(whole)
    for _, content in whole:
        piece, found, rest = rest.partition(content)
        if not found:
            raise ModelError(f"the chat template cannot be written as Go's: it changes or moves a turn; {_WAY_OUT}")
        pieces.append(piece)
    system_begins, to_user, to_answer, next_user, _ = pieces
    first, _, tail = text([("user", _QUESTION)], True).partition(_QUESTION)
    user_begins = _common([before[::-1] for before in (first, to_user, next_user)])[::-1]
    user_ends = _common([to_answer, tail])
    texts = TurnTexts(
        without_system=first.removesuffix(user_begins),
        system=(system_begins, to_user.removesuffix(user_begins)),
        user=(user_begins, user_ends),
        answer=(to_answer.removeprefix(user_ends), next_user.removesuffix(user_begins)),
        waiting=tail.removeprefix(user_ends),
    )
    for turns in _tried():
        if texts.render(turns) != text(turns, True):
            raise ModelError(f"the chat template cannot be written as Go's: it does more than that can say; {_WAY_OUT}")
    return texts


def _common(texts: Sequence[str]) -> str:
    """The beginning that all have."""
    length = next((at for at, chars in enumerate(zip(*texts)) if len(set(chars)) > 1), min(map(len, texts)))
    return texts[0][:length]


def _tried() -> list[list[tuple[str, str]]]:
    requested = [("user", "What is 2 + 2?")]
    talk = [*requested, ("assistant", "4."), ("user", "再说一遍，用中文。")]
    longer = [*talk, ("assistant", "四。\n\n- done"), ("user", '{"why": "<|x|>"}')]
    return [[*start, *turns] for start in ([], [("system", "Be brief.")]) for turns in (requested, talk, longer)]


def _around(texts: tuple[str, str]) -> str:
    return f"{_rendered(texts[0])}{{{{- .Content }}}}{_rendered(texts[1])}"


def _rendered(text: str) -> str:
    return f"{{{{- {_go_string(text)} }}}}" if text else ""


def _go_string(text: str) -> str:
    named = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    kept = (
        named.get(char)
        or (char if printable(char) else f"\\u{ord(char):04x}" if ord(char) < 1 << 16 else f"\\U{ord(char):08x}")
        for char in text
    )
    return f'"{"".join(kept)}"'
