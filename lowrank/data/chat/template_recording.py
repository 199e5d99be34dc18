"""What is noted of one rendering of a conversation, and what another rendering may take over from it.

See resumable_template.py for the whole of it. Here is what a template sees of the messages (`MessagesView`, which
notes what is learned of them), what is noted at each turn of a loop, and when two values are the same to a template.
"""

# Templates may read what has no underscore.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from operator import eq, ge, gt, le, lt, ne
from typing import Any

import jinja2
from jinja2.runtime import Macro
from jinja2.utils import missing

from lowrank.data.chat.template_budget import Budget, budget
from lowrank.data.chat.template_sandbox import Steps, TemplateNamespace

_NEVER = 1 << 60
"""No beginning has so many messages: something of the conversation's end was seen."""
_ENTRIES = 1000
"""More in one value are not compared."""


class NotResumable(Exception):
    """The template does something that cannot be followed; nothing is wrong with it."""


class MessagesView(Sequence[Any]):
    """The first messages of a conversation as a template sees them: a list that notes what is learned of it.

    It is none of Python's lists, so that nothing can look past it: what it does not offer is an error, and the
    conversation is rendered in the ordinary way."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, run: TemplateRun, first: int = 0) -> None:
        self._run, self._first = run, first

    def _length(self) -> int:
        return max(0, self._run.length - self._first)

    def __len__(self) -> int:
        self._run.need = _NEVER
        return self._length()

    def __bool__(self) -> bool:
        self._run.need = max(self._run.need, self._first + 1 if self._length() else _NEVER)
        return self._length() > 0

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return self._part(place)
        if not isinstance(place, int):
            raise TypeError(f"list indices must be integers or slices, not {type(place).__name__}")
        if place < 0:
            self._run.need = _NEVER
            return self._run.messages[self._first : self._run.length][place]
        if place >= self._length():
            self._run.need = _NEVER
            raise IndexError("list index out of range")
        self._run.need = max(self._run.need, self._first + place + 1)
        return self._run.messages[self._first + place]

    def _part(self, place: slice) -> Any:
        if place.stop is None and place.step in (None, 1) and (place.start is None or place.start >= 0):
            return MessagesView(self._run, self._first + (place.start or 0))
        return self._run.messages[self._first : self._first + len(self)][place]

    def __iter__(self) -> Iterator[Any]:
        return _elements(self, 0)

    def __getattr__(self, name: str) -> Any:
        if hasattr(list, name):
            raise NotResumable(name)
        raise AttributeError(name)

    def _not_followed(self, *_: Any) -> Any:
        raise NotResumable("a whole list of messages is compared, added or written")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _not_followed  # type: ignore[assignment]
    __add__ = __radd__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __str__ = __repr__ = __format__ = _not_followed


def _elements(view: MessagesView, first: int) -> Iterator[Any]:
    place = first
    while True:
        try:
            message = view[place]
        except IndexError:
            return
        yield message
        place += 1


Bounds = dict[str, tuple[int, int]]
"""Least and greatest value with which every comparison so far comes out the same, by name."""


@dataclass
class _Turns:
    """What was noted of one loop: before each of its turns `needs` (messages of a beginning that gets here in the same
    way) and `bounds`, `written` characters, `blocks` marked, and what the namespaces `held` of what turns assign."""

    first: int
    before: Any
    needs: list[int] = field(default_factory=list)
    bounds: list[Bounds] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    held: list[dict[str, dict[str, Any]]] = field(default_factory=list)

    def reached(self, length: int, numbers: Mapping[str, int]) -> int:
        """The last turn that a beginning of so many messages and with these numbers gets to in the same way."""

        def differs(place: int) -> bool:
            bounds = self.bounds[place].items()
            return self.needs[place] > length or any(
                not least <= numbers[name] <= most for name, (least, most) in bounds
            )

        return max(0, bisect_left(range(len(self.needs)), True, key=differs) - 1)


@dataclass
class Recording:
    """The whole conversation: its text, what is marked in that, and its loops by number and occurrence."""

    length: int
    whole: bool = False
    """It came to its end."""
    text: str = ""
    blocks: tuple[tuple[int, int], ...] = ()
    loops: dict[tuple[int, int], _Turns] = field(default_factory=dict)


@dataclass
class TemplateRun:
    """One rendering that goes on. `need`: see `_Turns`, since the present loop began."""

    messages: list[Any]
    length: int
    counts: Budget
    recording: Recording
    records: bool
    parts: list[str] = field(default_factory=list)
    need: int = 0
    bounds: Bounds = field(default_factory=dict)
    begun: Counter[int] = field(default_factory=Counter)

    def loop(self, items: Any, what: What, names: Mapping[str, Any]) -> Any:
        """What a loop of the template's own scope goes over, and from where."""
        number, exact, compared, assigned = what
        key = number, self.begun[number]
        self.begun[number] += 1
        if not isinstance(items, MessagesView):
            return Steps(items)
        known_spaces = [id(value) for value in names.values() if type(value) is TemplateNamespace]
        spaces = {name: (names[name], keys) for name, keys in assigned if type(names[name]) is TemplateNamespace}
        if len(set(known_spaces)) < len(known_spaces):  # one by two names
            return Steps(items)
        if any(keys is not None and name not in spaces for name, keys in assigned):
            return Steps(items)
        numbers = {name: value for name in compared if type(value := _looked_up(name, names)) is int}
        try:
            before = {name: _comparable(_looked_up(name, names)) for name in (*exact, *compared) if name not in numbers}
        except NotResumable:
            return Steps(items)
        if self.records:
            self.need, self.bounds = 0, {}
            turns = self.recording.loops[key] = _Turns(items._first, before)
            return Items(items, 0, self, turns, spaces)
        known = self.recording.loops.get(key)
        if known is None or known.first != items._first or known.before != before:
            return Steps(items)
        place = known.reached(self.length, numbers)
        if place:
            self._take_over(known, place, spaces)
        return Items(items, place)

    def _take_over(self, known: _Turns, place: int, spaces: _Spaces) -> None:
        whole, moved = self.recording, self.counts.written - known.written[0]
        text = whole.text[known.written[0] : known.written[place]]
        self.parts.append(text)
        self.counts.written += len(text)
        marked = whole.blocks[known.blocks[0] : known.blocks[place]]
        self.counts.blocks += [(start + moved, end + moved) for start, end in marked]
        for name, held in known.held[place].items():
            for key, value in held.items():
                spaces[name][0][key] = MessagesView(self, value._first) if isinstance(value, MessagesView) else value

    def note(self, turns: _Turns, spaces: _Spaces) -> None:
        """Before a turn of a loop that is recorded."""
        if self.need == _NEVER:
            return
        held = {}
        for name, (space, assigned) in spaces.items():
            own = attributes(space)
            keys = own if assigned is None else assigned
            held[name] = {key: own[key] for key in keys if key in own}
        try:
            _comparable(held)
        except NotResumable:
            self.need = _NEVER
            return
        turns.needs.append(self.need)
        turns.bounds.append(dict(self.bounds))
        turns.written.append(self.counts.written)
        turns.blocks.append(len(self.counts.blocks))
        turns.held.append(held)

    def compare(self, name: str, value: Any, operator: str, other: Any) -> bool:
        """Of a number from before the loop with something else. Its bounds are noted."""
        result = _COMPARISONS[operator](value, other)
        if type(value) is int:
            if type(other) is not int:
                self.need = _NEVER
                return result
            bounds = self.bounds.get(name, (-_NEVER, _NEVER))
            self.bounds[name] = _bounded(bounds, value, operator, other)
        return result


def _bounded(bounds: tuple[int, int], value: int, operator: str, other: int) -> tuple[int, int]:
    """Narrower, so that every value within compares as `value` did; it may keep out others that would, too."""
    least, most = bounds
    if value > other or (value == other and operator in ("gteq", "lt")):
        least = max(least, other if operator in ("gteq", "lt") else other + 1)
    elif value < other or operator in ("lteq", "gt"):
        most = min(most, other if operator in ("lteq", "gt") else other - 1)
    else:  # equal, and asked for that
        least = most = value
    return least, most


What = tuple[int, tuple[str, ...], tuple[str, ...], tuple[tuple[str, "tuple[str, ...] | None"], ...]]
"""Of a loop: its number, and what `LoopReads` calls `exact`, `compared` and `assigned`."""
_Spaces = dict[str, tuple[Any, "tuple[str, ...] | None"]]
"""Namespaces, and which attributes are assigned."""
_COMPARISONS = {"gt": gt, "gteq": ge, "lt": lt, "lteq": le, "eq": eq, "ne": ne}


def _looked_up(name: str, names: Mapping[str, Any]) -> Any:
    """`name`, or `name.attribute` of a namespace; of anything else the whole."""
    first, _, attribute = name.partition(".")
    value = names[first]
    return attributes(value).get(attribute) if attribute and type(value) is TemplateNamespace else value


RUN: ContextVar[TemplateRun] = ContextVar("resumable_template")
"""The rendering that goes on in this thread, for the filters of the compiled template."""


class Items:
    """Messages from one of them on, for a loop that may note its turns."""

    def __init__(
        self,
        view: MessagesView,
        first: int,
        run: TemplateRun | None = None,
        turns: _Turns | None = None,
        spaces: _Spaces | None = None,
    ) -> None:
        self._view, self.first = view, first
        self._run, self._turns, self._spaces = run, turns, spaces or {}

    def before(self) -> Any:
        """The message before the first of these; undefined where there is none."""
        return self._view[self.first - 1] if self.first else missing

    def note(self) -> None:
        """Remember that the loop looks at itself here (`TemplateRun.note`)."""
        if self._run is not None and self._turns is not None:
            self._run.note(self._turns, self._spaces)

    def elements(self) -> Iterator[Any]:
        """The messages, each counted as a step of the template."""
        counts = budget()
        for message in _elements(self._view, self.first):
            counts.step()
            yield message

    def __iter__(self) -> Iterator[Any]:
        """For a loop that does not look at itself."""
        elements = self.elements()
        while True:
            self.note()
            message = next(elements, missing)
            if message is missing:
                return
            yield message

    def __len__(self) -> int:
        return len(self._view)


def attributes(space: TemplateNamespace) -> dict[str, Any]:
    """What a namespace holds, by name."""
    return object.__getattribute__(space, "_Namespace__attrs")


def _comparable(value: Any) -> Any:
    """Equal only for values that a template cannot tell apart. NotResumable where that cannot be said."""
    waiting, entries = [value], 0
    while waiting:  # measured first, so that what follows ends
        each = waiting.pop()
        if isinstance(each, (list, tuple, dict)):
            waiting += [*each.keys(), *each.values()] if isinstance(each, dict) else each
        entries += 1
        if entries > _ENTRIES:
            raise NotResumable("a value of many entries")
    return _compared(value)


def _compared(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (str, bool, int, float):
        return kind, value
    if kind in (list, tuple):
        return kind, tuple(map(_compared, value))
    if kind is dict:
        return kind, tuple((_compared(key), _compared(item)) for key, item in value.items())
    if kind is MessagesView:
        return kind, value._first
    if kind is Macro:
        return kind, value.name, id(value._func.__code__)
    if isinstance(value, jinja2.Undefined):
        return jinja2.Undefined, None
    if kind is TemplateNamespace:
        held = attributes(value)
        if any(isinstance(each, TemplateNamespace) for each in held.values()):
            raise NotResumable("a namespace in a namespace")
        return kind, _compared(held)
    raise NotResumable(f"a value of {kind.__name__}")
