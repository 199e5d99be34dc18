"""Predicts how large the result of an operator, a filter or a method of a template will be, before it is made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2.runtime import Undefined
from jinja2.sandbox import SandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from markupsafe import Markup

from lowrank.data.chat.template_budget import Budget, TemplateCostsTooMuch, budget

_NUMBER = re.compile(r"\d{1,30}")
_WIDTHS = ("center", "ljust", "rjust", "zfill", "to_bytes")
_COUNTED = ("batch", "slice", "indent", "truncate", "wordwrap", "round", "filesizeformat")
"""Filters whose integers are sizes."""
_SLOW = ("striptags", "urlize", "wordwrap", "xmlattr", "urlencode", "pprint", "title", "unique", "groupby")
"""Filters that take longer than their text is long."""
_SLOW_SIZE = 1 << 17
_DEEPEST_INDENT = 64


def before_operator(counts: Budget, operator: str, left: Any, right: Any) -> None:
    """`left operator right`."""
    if operator == "+" and _sized(left) and _sized(right):
        counts.expect(len(left) + len(right))
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if _sized(value) and isinstance(times, int):
                counts.expect(counts.weigh(value) * max(0, int(times)))
        if isinstance(left, int) and isinstance(right, int):
            counts.integer(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        counts.integer(abs(left).bit_length() * abs(right))
    elif operator == "%" and isinstance(left, (str, bytes)):
        _before_percent(counts, str(left), right)


def before_filter(counts: Budget, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """`args[0] | name(args[1:], kwargs)`. Returns the arguments, with what can be read only once as a list."""
    counts.step()
    value, rest = (args[0] if args else ""), [*args[1:], *kwargs.values()]
    numbers = [int(each) for each in rest if isinstance(each, (int, float)) and abs(each) < float("inf")]
    if name in _COUNTED:
        counts.expect(max((abs(number) for number in numbers), default=0))
    if name == "round" and max(map(abs, numbers), default=0) > 1000:
        raise TemplateCostsTooMuch(f"it rounds to {max(map(abs, numbers)):,} places")
    if name in _SLOW and counts.weigh(value) > _SLOW_SIZE:
        raise TemplateCostsTooMuch(f"it asks {name} for a text of more than {_SLOW_SIZE:,} characters")
    if name == "center":
        counts.expect(max([80, *numbers]))
    elif name == "indent":
        widths = [len(each) if isinstance(each, str) else 0 for each in rest] + numbers
        text = str(value) if isinstance(value, str) else ""
        counts.expect(len(text) + (text.count("\n") + len(text.splitlines()) + 2) * max([4, *widths]))
    elif name == "replace" and isinstance(value, str) and len(rest) > 1:
        _before_replace(counts, value, rest[0], rest[1])
    elif name == "join" and args:
        items = value if isinstance(value, (list, tuple, str, Mapping)) else _listed(counts, value)
        between = rest[0] if rest and isinstance(rest[0], str) else ""
        counts.expect(counts.weigh(items) + len(between) * len(items))
        args = (items, *args[1:])
    elif name == "batch" and numbers:
        counts.expect(max(numbers) * max(map(counts.weigh, rest)))
    elif name == "format":
        _before_percent(counts, str(value), dict(kwargs) or args[1:])
    elif name == "tojson":
        requested = kwargs.get("indent", rest[1] if len(rest) > 1 else 0)
        deep = len(requested) if isinstance(requested, str) else int(requested or 0)
        if deep > _DEEPEST_INDENT:
            raise TemplateCostsTooMuch(f"it indents JSON by {deep:,} characters")
        counts.weigh(value)
    elif name in ("string", "safe", "escape", "e", "forceescape", "upper", "lower", "trim", "sum", "list", "reverse"):
        counts.weigh(value)
    return args


def before_method(counts: Budget, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """`function(args, kwargs)`, where it is a method of a string, bytes or an integer. Returns the arguments."""
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    values = [*args, *kwargs.values()]
    if isinstance(owner, (str, bytes, int)) and name in _WIDTHS:
        counts.expect(max((each for each in values if isinstance(each, int)), default=0))
    elif isinstance(owner, (str, bytes)):
        if name == "expandtabs":
            tabs = owner.count("\t") if isinstance(owner, str) else owner.count(b"\t")
            counts.expect(len(owner) + tabs * max([8, *(each for each in values if isinstance(each, int))]))
        elif name == "join" and len(args) == 1:
            items = args[0] if isinstance(args[0], (list, tuple, str, Mapping)) else _listed(counts, args[0])
            counts.expect(sum(map(counts.weigh, items)) + len(owner) * len(items))
            args = (items,)
        elif name == "replace" and len(args) > 1:
            _before_replace(counts, owner, args[0], args[1])
        elif name == "translate" and args and isinstance(args[0], Mapping):
            counts.expect(len(owner) * max(map(counts.weigh, args[0].values()), default=1))
    elif not isinstance(owner, (list, dict)):
        for each in values:
            if isinstance(each, (list, tuple, dict)) and not _is_macro(function):
                counts.weigh(each)
    return args


def formatter_for(environment: SandboxedEnvironment, method: Any) -> Callable[..., str]:
    """`str.format` or `str.format_map` of a text, sandboxed and counted."""
    text, by_mapping = method.__self__, method.__name__ == "format_map"
    kind = _EscapingFormatter if isinstance(text, Markup) else _Formatter
    settings = {"escape": text.escape} if isinstance(text, Markup) else {}

    def format_text(*args: Any, **kwargs: Any) -> str:
        if by_mapping:
            if kwargs or len(args) != 1:
                raise TypeError("format_map() takes exactly one argument")
            args, kwargs = (), args[0]
        return type(text)(kind(environment, **settings).vformat(text, args, kwargs))

    return format_text


class _Counting:
    """For `string.Formatter`s."""

    def format_field(self, value: Any, format_spec: str) -> str:
        """One field, no wider than a value may be."""
        counts = budget()
        counts.expect(max(map(int, _NUMBER.findall(format_spec)), default=0))
        counts.weigh(value)
        described: str = super().format_field(value, format_spec)  # type: ignore[misc]
        counts.made(described)
        return described


class _Formatter(_Counting, SandboxedFormatter):
    pass


class _EscapingFormatter(_Counting, SandboxedEscapeFormatter):
    pass


def _before_percent(counts: Budget, text: str, values: Any) -> None:
    fields = text.count("%")
    if isinstance(values, Mapping):
        widest = fields * max(map(counts.weigh, values.values()), default=0)
    else:
        widest = counts.weigh(values)
    written = sum(map(int, _NUMBER.findall(text))) if fields else 0
    numbers = [each for each in _flat(values) if isinstance(each, int)] if "*" in text else []
    counts.expect(len(text) + widest + written + sum(map(abs, numbers)))


def _before_replace(counts: Budget, text: Any, old: Any, new: Any) -> None:
    if isinstance(text, (str, bytes)) and isinstance(old, type(text) if isinstance(text, bytes) else str):
        times = text.count(old)  # type: ignore[arg-type]
        counts.expect(len(text) + times * max(0, counts.weigh(new) - len(old)))


def _listed(counts: Budget, items: Any) -> Any:
    """As a list, if it can be read only once."""
    if isinstance(items, Undefined) or not isinstance(items, Iterable):
        return [] if isinstance(items, Undefined) else items
    made = []
    for item in items:
        counts.step()
        made.append(item)
    return made


def _flat(values: Any) -> list[Any]:
    if isinstance(values, Mapping):
        return list(values.values())
    return list(values) if isinstance(values, (list, tuple)) else [values]


def _sized(value: Any) -> bool:
    return isinstance(value, (str, bytes, list, tuple))


def _is_macro(function: Any) -> bool:
    return type(function).__name__ in ("Macro", "BlockReference")
