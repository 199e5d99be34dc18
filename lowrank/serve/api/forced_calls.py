"""Calls that an answer must make, as a grammar: in the format that the chat template teaches (tool_calls.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.serve.api.tool_calls import CallFormat, format_of

_AS_TRAINED = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
"""JSON as `tojson` writes it: that is what models saw, and white space without end is none of their choices."""
_MOST_CALLS = 8


def grammar_of(template: str, tools: Sequence[Mapping[str, Any]], *, several: bool) -> str:
    """llguidance's Lark for one call of one of `tools`, or for up to eight where `several` may be made."""
    written = _Rules()
    form = format_of(template)
    calls = [_call(written, form, tool.get("function", tool)) for tool in tools]
    before, between, after = form.around
    written.rules["call"] = " | ".join(calls)
    more = f" ({_text(between)} call){{0,{_MOST_CALLS - 1}}}" if several and form.several else ""
    written.rules["start"] = " ".join(filter(None, [_text(before), "call" + more, _text(after)]))
    return "\n".join(f"{name}: {rule}" for name, rule in reversed(written.rules.items()))


class _Rules:
    """The rules of a grammar, and names for new ones."""

    def __init__(self) -> None:
        self.rules: dict[str, str] = {}

    def add(self, kind: str, rule: str, attributes: str = "") -> str:
        """Its name."""
        name = f"{kind}_{len(self.rules)}"
        self.rules[name + attributes] = rule
        return name

    def json(self, schema: Mapping[str, Any]) -> str:
        """JSON of a schema."""
        return self.add("json", f"%json {json.dumps({**schema, **_AS_TRAINED})}")


def _call(written: _Rules, form: CallFormat, tool: Mapping[str, Any]) -> str:
    name, schema = str(tool.get("name")), _object(tool.get("parameters"))
    before, after = (each.replace("NAME", name) for each in form.call)
    if form.argument is None:
        return written.add("call", f"{_text(before)} {written.json(schema)} {_text(after)}".strip())
    parts = [_argument(written, form.argument, schema, key) for key in schema["properties"]]
    return written.add("call", " ".join(filter(None, [_text(before), *parts, _text(after)])))


def _argument(written: _Rules, around: tuple[str, str], schema: Mapping[str, Any], key: str) -> str:
    """A parameter between tags, or nothing where it is not required. A text stands there as it is."""
    declared = schema["properties"][key]
    before, after = around[0].replace("KEY", key), around[1]
    choices = declared.get("enum") if isinstance(declared, Mapping) else None
    if choices and all(isinstance(choice, str) for choice in choices):
        value = f"({' | '.join(map(_text, choices))}) {_text(after)}"
    elif isinstance(declared, Mapping) and declared.get("type") == "string":
        value = written.add("text", rf"/(.|\n){_length(declared)}/", f"[suffix={_text(after)}]")
    else:
        definitions = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
        inner = declared if isinstance(declared, Mapping) else {}
        value = f"{written.json({**definitions, **inner})} {_text(after)}"
    rule = f"{_text(before)} {value}"
    return rule if key in schema.get("required", ()) else f"({rule})?"


def _length(declared: Mapping[str, Any]) -> str:
    """How many characters a text may have, as a regular expression counts."""
    least, most = declared.get("minLength"), declared.get("maxLength")
    if not isinstance(least, int) and not isinstance(most, int):
        return "*"
    return f"{{{least if isinstance(least, int) else 0},{most if isinstance(most, int) else ''}}}"


def _object(schema: Any) -> dict[str, Any]:
    """What a function takes; without a schema any object."""
    if not isinstance(schema, Mapping) or not schema:
        return {"type": "object", "properties": {}}
    properties = schema.get("properties")
    return {"type": "object", **_closed(schema), "properties": _closed(properties) if properties else {}}


def _closed(schema: Any) -> Any:
    """Objects that say what they hold and not whether more may follow hold no more: else there is no end to them."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed = {key: _closed(value) if key not in ("enum", "const") else value for key, value in schema.items()}
    if isinstance(schema.get("properties"), Mapping) and "type" in schema:
        closed.setdefault("additionalProperties", False)
    return closed


def _text(text: str) -> str:
    """A literal of a grammar; empty for no text."""
    return json.dumps(text, ensure_ascii=False) if text else ""
