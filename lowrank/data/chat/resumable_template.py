"""Renderings of the beginnings of one conversation, each from where it first differs from the whole.

A template is asked for the conversation up to each of its answers, and would go through all earlier turns each time.
So the whole is rendered once, with a note at each turn of a loop over the messages: what was written, what the
template's namespaces hold, and how many messages a beginning needs for the template to have seen the same until here.
A beginning runs the template too, but enters such a loop at the last turn up to which it can only do the same.

That is exact, not a guess: messages are handed over as `MessagesView`, which notes whatever a template learns of
them, its length included; everything else that a turn of a loop can read are the names and namespaces before the
loop (loop_reads.py), which have to be equal, or, where they are numbers that are only compared, as the place of the
last question, to compare alike. Where anything else happens, `NotResumable` is raised and the caller renders the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import takewhile
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext
from jinja2.utils import pass_context

from lowrank.data.chat.loop_reads import INNER, MIRRORED, LoopReads, TemplateReads
from lowrank.data.chat.template_budget import BUDGET, Budget
from lowrank.data.chat.template_recording import (
    RUN,
    Items,
    MessagesView,
    NotResumable,
    Recording,
    TemplateRun,
    What,
    attributes,
)
from lowrank.data.chat.template_sandbox import (
    Counting,
    Environment,
    Size,
    TemplateNamespace,
    aliased,
    plain,
)

_LOOP, _COMPARE, _WHILE = (f"lowrank_{name}" for name in ("loop", "compare", "while"))
"""Filters that are put into the compiled template."""


class _Loop(LoopContext):
    """`loop`, which may begin in the midst of what it goes over."""

    def __init__(self, iterable: Any, undefined: Any, recurse: Any = None, depth0: int = 0) -> None:
        super().__init__(iterable, undefined, recurse, depth0)
        self._items = iterable if isinstance(iterable, Items) else None
        if self._items is not None:
            self._iterator = self._items.elements()
            self.index0 = self._items.first - 1
            self._current = self._items.before()

    def __next__(self) -> Any:
        if self._items is not None:
            self._items.note()
        return super().__next__()

    def changed(self, *value: Any) -> bool:
        """What earlier turns called it with is not noted."""
        if self._items is not None:
            raise NotResumable("loop.changed")
        return super().changed(*value)


class _Following(Counting):
    """Wraps what loops of the template's own scope go over, and comparisons of their turns with what was before."""

    def __init__(self, template: nodes.Template) -> None:
        self._reads = TemplateReads(template)
        self._compared: Mapping[int, tuple[str, bool]] = {}
        self._depth = self._loops = 0

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        outer = self._depth
        reads = self._reads.of_loop(node) if isinstance(node, nodes.For) and not outer else None
        if reads is not None and isinstance(node, nodes.For):
            self._compared = reads.comparisons if _resumable(node) else {}
        self._depth += isinstance(node, INNER)
        visited = super().visit(node, *args, **kwargs)
        self._depth = outer
        if reads is not None:
            self._wrap(visited, reads)
            self._compared = {}
        return visited

    def _wrap(self, loop: nodes.For, reads: LoopReads) -> None:
        """`loop.iter` counts its steps already."""
        if reads.idle_without is not None:
            name, attribute = reads.idle_without
            given: list[nodes.Expr] = [nodes.Name(name, "load"), nodes.Const(attribute)]
            loop.iter = nodes.Filter(loop.iter, _WHILE, given, [], None, None)
        elif _resumable(loop) and isinstance(loop.iter, nodes.Filter):
            pairs = [nodes.Pair(nodes.Const(name), nodes.Name(name, "load")) for name in self._reads.names]
            what = (self._loops, reads.exact, reads.compared, tuple(reads.assigned.items()))
            loop.iter = nodes.Filter(loop.iter.node, _LOOP, [nodes.Const(what), nodes.Dict(pairs)], [], None, None)
        loop.iter.set_lineno(loop.lineno)
        self._loops += 1

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        found = self._compared.get(id(node))
        self.generic_visit(node)
        if found is None:
            return node
        name, left = found
        operand = node.ops[0]
        value, other = (node.expr, operand.expr) if left else (operand.expr, node.expr)
        operator = operand.op if left else MIRRORED[operand.op]
        given = [nodes.Const(name), nodes.Const(operator), other]
        return nodes.Filter(value, _COMPARE, given, [], None, None, lineno=node.lineno)


def _resumable(loop: nodes.For) -> bool:
    return not (loop.test or loop.recursive or loop.else_)


@pass_context
def _loop(_context: Any, items: Any, what: What, names: Mapping[str, Any]) -> Any:
    return RUN.get().loop(items, what, names)


@pass_context
def _compare(_context: Any, value: Any, name: str, operator: str, other: Any) -> bool:
    return RUN.get().compare(name, value, operator, other)


@pass_context
def _while(_context: Any, items: Any, space: Any, attribute: str) -> Any:
    """Until the turns of a loop are idle."""
    if type(space) is not TemplateNamespace:
        return items
    return takewhile(lambda _: attributes(space).get(attribute), items)


class _FollowingEnvironment(Environment):
    def __init__(self) -> None:
        super().__init__()
        self.filters |= {_LOOP: _loop, _COMPARE: _compare, _WHILE: _while}

    def counting(self, parsed: nodes.Template) -> Counting:
        return _Following(parsed)


_ENVIRONMENT = _FollowingEnvironment()


@lru_cache(maxsize=64)
def _compiled(text: str) -> jinja2.Template:
    template = _ENVIRONMENT.from_string(text)
    template.root_render_func.__globals__["LoopContext"] = _Loop  # where the compiled template looks it up
    return template


class ConversationBeginnings:
    """Renders the first messages of one conversation, many times.

    text      the Jinja source
    tools     schemas; None for none
    longest   most messages asked for, without and with generation prompt
    special   the tokenizer's tokens by name
    """

    def __init__(
        self,
        text: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        longest: tuple[int, int],
        special: Mapping[str, Any],
    ) -> None:
        self._text, self._longest = text, longest
        size = Size()
        self._given = {"tools": plain(tools, size), "documents": None}
        self._special = special
        self._messages: list[Any] = []
        self._sizes = [size.characters]
        for message in messages:
            self._messages.append(aliased(plain(message, size)))
            self._sizes.append(size.characters)
        self._recordings: dict[Any, Recording | None] = {}

    def render(
        self, length: int, generation_prompt: bool, variables: Mapping[str, Any]
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        """Text and marks as `template_sandbox.render` has them for `messages[:length]`. Raises whatever jinja2 and the
        template raise, and NotResumable; only that function's error says what is wrong with the row."""
        variables = {**self._special, **variables}
        if variables.keys() & {*self._given, "messages", "add_generation_prompt"}:
            raise NotResumable("a variable with the name of another")
        key = generation_prompt, repr(variables)
        known = self._recordings.get(key)
        if known is None:
            known = self._recordings[key] = Recording(self._longest[generation_prompt])
            self._record(known, generation_prompt, variables)
        if length > known.length:
            raise NotResumable("more than was recorded")
        if length == known.length and known.whole:
            return known.text, known.blocks
        run = self._run_of(known, length, variables, records=False)
        self._run(run, generation_prompt, variables)
        return "".join(run.parts), tuple(run.counts.blocks)

    def _record(self, recording: Recording, generation_prompt: bool, variables: Mapping[str, Any]) -> None:
        run = self._run_of(recording, recording.length, variables, records=True)
        with suppress(Exception):  # what was noted until then holds, and whom it concerns will meet it again
            self._run(run, generation_prompt, variables)
            recording.whole = True
        recording.text, recording.blocks = "".join(run.parts), tuple(run.counts.blocks)

    def _run_of(self, recording: Recording, length: int, variables: Mapping[str, Any], records: bool) -> TemplateRun:
        size = Size(self._sizes[length])
        plain(variables, size)
        counts = Budget(size.characters, length)
        return TemplateRun(self._messages, length, counts, recording, records)

    def _run(self, run: TemplateRun, generation_prompt: bool, variables: Mapping[str, Any]) -> None:
        variables = {name: plain(value, Size()) for name, value in variables.items()}
        tokens = BUDGET.set(run.counts), RUN.set(run)
        given = {**variables, **self._given, "messages": MessagesView(run)}
        try:
            for part in _compiled(self._text).generate(**given, add_generation_prompt=generation_prompt):
                run.parts.append(part)
                run.counts.written += len(part)
        finally:
            BUDGET.reset(tokens[0])
            RUN.reset(tokens[1])
