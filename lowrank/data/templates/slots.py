"""Chat templates of LLaMA-Factory's registry, written as Jinja from what stands around each turn.

`llamafactory.json` has their facts by name: the text around a system prompt, a question and an answer (`{{content}}` is
the turn itself, `<BOS>` and `<EOS>` are the tokenizer's), and

    prefix               what a conversation begins with
    default_system       the system prompt of a conversation without one
    system_in_user       the system prompt stands within the first question
    empty_thought        what stands before an answer without a thought
    stop                 texts that end an answer
    ends_with_next_turn  an answer has no end of its own: the next turn's first token is learned as one
    replaces             it takes the place of the tokenizer's own template, also in what is exported
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

PREFIX = "llamafactory/"
"""What their names begin with where a chat template is chosen: `llamafactory/vicuna`."""
CONTENT = "{{content}}"
_FILE = Path(__file__).parent / "llamafactory.json"
_PIECES = re.compile(r"(<BOS>|<EOS>|\{\{content\}\})")
_CONTROL = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


@cache
def registry() -> Mapping[str, Mapping[str, Any]]:
    """The facts by name."""
    return json.loads(_FILE.read_text(encoding="utf-8"))


def can_be_written(name: str) -> bool:
    """Whether the template is complete without what only their code does: thoughts, and ends that are the next turn's
    beginning."""
    facts = registry().get(name, {"empty_thought": "-"})
    return not facts.get("empty_thought") and not facts.get("ends_with_next_turn")


def written_text(name: str, turns: list[tuple[str, str]], system: str = "", bos: str = "", eos: str = "") -> str:
    """A conversation of questions and answers as LLaMA-Factory writes it."""
    facts = registry()[name]
    system = system or facts.get("default_system", "")
    opening = facts.get("system", "").replace(CONTENT, system) if system else ""
    text = facts.get("prefix", "")
    for number, (question, answer) in enumerate(turns):
        first = opening if number == 0 else ""
        user = facts.get("user", CONTENT)
        text += (
            user.replace(CONTENT, first + question)
            if facts.get("system_in_user")
            else first + user.replace(CONTENT, question)
        )
        text += facts.get("empty_thought", "") + facts.get("assistant", CONTENT).replace(CONTENT, answer)
    return text.replace("<BOS>", bos).replace("<EOS>", eos)


def jinja_of(name: str) -> str:
    """The Jinja source of a template that `can_be_written`."""
    facts = registry()[name]
    answer, break_after = _split_break(facts.get("assistant", CONTENT))
    system = facts.get("system", CONTENT)
    user = facts.get("user", CONTENT)
    opening = _joined(system, "system")
    question = _joined(user, "(opening if loop.first else '') + message.content")
    if not facts.get("system_in_user"):
        question = f"(opening if loop.first else '') + {_joined(user, 'message.content')}"
    lines = [
        f"{{#- LLaMA-Factory's {name}. Special tokens: {' '.join(_required(facts)) or 'none but EOS'} -#}}",
        "{%- set rest = messages %}",
        f"{{%- set system = {_quoted(facts.get('default_system', ''))} %}}",
        "{%- if messages[0].role == 'system' %}",
        "    {%- set system = messages[0].content %}",
        "    {%- set rest = messages[1:] %}",
        "{%- endif %}",
        f"{{%- set opening = ({opening}) if system else '' %}}",
        *([f"{{{{- {_joined(facts['prefix'], '')} }}}}"] if facts.get("prefix") else []),
        "{%- for message in rest %}",
        "    {%- if message.role == 'user' %}",
        f"        {{{{- {question} }}}}",
        "    {%- elif message.role == 'assistant' %}",
        "        {%- generation %}",
        f"            {{{{- {_joined(answer, 'message.content')} }}}}",
        "        {%- endgeneration %}",
        *([f"        {{{{- {_quoted(break_after)} }}}}"] if break_after else []),
        "    {%- else %}",
        "        {{- raise_exception('this template knows no role ' + message.role + ' after the first turn') }}",
        "    {%- endif %}",
        "{%- endfor %}",
    ]
    return "\n".join(lines) + "\n"


def _required(facts: Mapping[str, Any]) -> list[str]:
    """The special tokens that end an answer: without them nothing would."""
    answer = facts.get("assistant", CONTENT)
    return [token for token in dict.fromkeys(_CONTROL.findall(answer)) if token not in ("<BOS>", "<EOS>")]


def _split_break(answer: str) -> tuple[str, str]:
    """What is learned of an answer's slot, and the white space after it, which is not."""
    learned = answer.rstrip() if answer.rstrip() != CONTENT else answer
    return learned, answer[len(learned) :]


def _joined(slot: str, content: str) -> str:
    """A slot as a Jinja expression."""
    named = {"<BOS>": "bos_token", "<EOS>": "eos_token", CONTENT: content}
    parts = [named.get(piece) or _quoted(piece) for piece in _PIECES.split(slot) if piece]
    return " + ".join(parts) or "''"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
