"""What a model thinks before it answers, told apart from the answer: `reasoning_content` beside `content`.

Templates of models that think write thoughts between tags. Some end their generation prompt within an open one, so that
the answer begins in the midst of a thought; then a form that the answer has to keep (JSON, a call) begins behind it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from lowrank.data.chat import channels, template_sandbox
from lowrank.data.chat.channels import Channels
from lowrank.data.chat.overlap import overlap
from lowrank.data.chat.template_budget import TemplateCostsTooMuch

_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>thought", "<channel|>"))
"""Most families; Magistral; Gemma 4. Those of the last two are control tokens, or begin with one."""
_LONGEST_SPACE = 64
"""Characters of white space that are held back, since a thought may begin or end with them."""


@dataclass(frozen=True)
class Thoughts:
    """How a model of some template thinks: between which tags, and whether its answer begins in a thought."""

    opening: str
    closing: str
    begun: bool

    @property
    def marks(self) -> tuple[str, ...]:
        """What of an answer has to be told for thoughts to be found in it, were it control tokens."""
        return (self.opening.removesuffix("thought"), self.closing)

    def reader(self) -> ThoughtReader:
        """For one answer."""
        return ThoughtReader(self)

    def left_in(self) -> None:
        """Nobody reads the answer where its thoughts are wanted in the text, between their tags."""
        return

    def before(self, form: Mapping[str, Any]) -> dict[str, Any]:
        """A form to keep (`json_schema` or `grammar` of GenerationConfig) with the thought that comes first."""
        schema, grammar = form.get("json_schema"), form.get("grammar")
        if not self.begun or (schema is None and grammar is None):
            return dict(form)
        rules = grammar if grammar is not None else f"start: %json {json.dumps(schema)}"
        rules = rules.replace("start:", "answer_in_form:", 1) if rules.startswith("start:") else _renamed(rules)
        thought = f"thought[suffix={json.dumps(self.closing)}]: /(.|\\n)*/"
        return {"grammar": f"start: thought /\\n{{0,2}}/ answer_in_form\n{thought}\n{rules}"}


Thinking = Thoughts | Channels
"""How a model thinks, by its template."""


def _renamed(rules: str) -> str:
    return rules.replace("\nstart:", "\nanswer_in_form:", 1)


def thoughts_of(template: str, variables: Mapping[str, Any]) -> Thinking | None:
    """None for a template that knows of no thoughts. `variables`: what the template is always given."""
    if channels.SIGN in template:
        return Channels()
    return _found(template, json.dumps(dict(variables), sort_keys=True, default=str))


@lru_cache(maxsize=64)
def _found(template: str, variables: str) -> Thoughts | None:
    tags = next((pair for pair in _TAGS if pair[1] in template), None)
    if tags is None:
        return None
    given = {"bos_token": "", "eos_token": "", "unk_token": "", "pad_token": "", **json.loads(variables)}
    question = [{"role": "user", "content": "?"}]
    try:
        text, _ = template_sandbox.render(
            template, messages=question, tools=None, generation_prompt=True, variables=given
        )
    except (TemplateError, TemplateCostsTooMuch, ValueError, TypeError, LookupError, AttributeError):
        text = ""  # asking it in earnest will say what is wrong
    return Thoughts(*tags, begun=text.rfind(tags[0]) > text.rfind(tags[1]))


class ThoughtReader:
    """Takes an answer in pieces; gives back what is thought and what is answered, without the tags."""

    def __init__(self, thoughts: Thoughts) -> None:
        self._opening, self._closing = thoughts.opening, thoughts.closing
        self._held = ""
        self._thinking: bool | None = True if thoughts.begun else None
        """None: nothing came yet that would tell."""
        self._thoughts: list[str] = []
        self._bare = True
        """Nothing was given back of the present part, whose leading white space goes."""

    def add(self, text: str) -> tuple[str, str]:
        """The thought and the answer that are sure now."""
        self._held += text
        thought = ""
        if self._thinking is None:
            begun = self._held.lstrip()
            if begun.startswith(self._opening):
                self._held, self._thinking = begun[len(self._opening) :], True
            elif self._opening.startswith(begun) and len(self._held) <= _LONGEST_SPACE:
                return "", ""
            else:
                self._thinking, self._bare = False, False
        if self._thinking:
            thought, done = self._thought()
            if not done:
                return thought, ""
        return thought, self._answer()

    def end(self, *, whole: bool = False) -> tuple[str, str]:
        """What is left. `whole`: the model itself ended its answer, so what it only thought is what it says."""
        held, self._held = self._held, ""
        if self._bare and self._thinking is not None:
            held = held.lstrip()
        if not self._thinking:
            return "", held
        held = held.rstrip()
        self._thoughts.append(held)
        return held, "".join(self._thoughts) if whole else ""

    def _thought(self) -> tuple[str, bool]:
        if self._bare:
            self._held = self._held.lstrip()
        place = self._held.find(self._closing)
        if place >= 0:
            thought, self._held = self._held[:place].rstrip(), self._held[place + len(self._closing) :]
            self._thinking, self._bare = False, True
            return thought, True
        end = len(self._held) - overlap(self._held, self._closing)
        kept = len(self._held[:end].rstrip())
        sure = end if end - kept > _LONGEST_SPACE else kept
        thought, self._held = self._held[:sure], self._held[sure:]
        self._bare = self._bare and not thought
        self._thoughts.append(thought)
        return thought, False

    def _answer(self) -> str:
        answer = self._held.lstrip() if self._bare else self._held
        self._held = ""
        self._bare = self._bare and not answer
        return answer
