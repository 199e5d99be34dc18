"""The part of Go's text/template that Ollama's chat templates use, rendered as Ollama does (template/template.go)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_ACTION = re.compile(r"\{\{(- )?(.*?)( -)?\}\}", re.DOTALL)
_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[()]|[^\s(),"]+')


def render(template: str, turns: Sequence[tuple[str, str]]) -> str:
    """As Ollama calls it: neighbors of one role are joined, the system prompts also stand in .System."""
    messages: list[dict[str, Any]] = []
    for role, content in turns:
        if messages and messages[-1]["Role"] == role:
            messages[-1]["Content"] += "\n\n" + content
        else:
            messages.append({"Role": role, "Content": content})
    system = "\n\n".join(message["Content"] for message in messages if message["Role"] == "system")
    root = {"Messages": messages, "System": system}
    tree, rest = _parse(_pieces(template))
    assert not rest, "an end too many"
    out: list[str] = []
    _run(tree, root, {"$": root}, out)
    return "".join(out)


def _pieces(template: str) -> list[tuple[str, Any]]:
    """("text", str) and ("do", words); `{{-` and `-}}` take the white space beside them away."""
    found: list[tuple[str, Any]] = []
    at, trim = 0, False
    for match in _ACTION.finditer(template):
        text = template[at : match.start()]
        text = text.lstrip(" \t\r\n") if trim else text
        found.append(("text", text.rstrip(" \t\r\n") if match[1] else text))
        found.append(("do", _TOKEN.findall(match[2])))
        at, trim = match.end(), bool(match[3])
    text = template[at:]
    return [*found, ("text", text.lstrip(" \t\r\n") if trim else text)]


def _parse(pieces: list[tuple[str, Any]]) -> tuple[list[Any], list[tuple[str, Any]]]:
    """A list of nodes until an `end` or `else`, which is left in the rest."""
    nodes: list[Any] = []
    while pieces:
        kind, value = pieces[0]
        if kind == "do" and value[0] in ("end", "else"):
            return nodes, pieces
        pieces = pieces[1:]
        if kind == "do" and value[0] in ("if", "range"):
            node, pieces = _block(value, pieces)
            nodes.append(node)
        else:
            nodes.append((kind, value))
    return nodes, []


def _block(tokens: list[str], pieces: list[tuple[str, Any]]) -> tuple[Any, list[tuple[str, Any]]]:
    inside, pieces = _parse(pieces)
    closing, pieces = pieces[0][1], pieces[1:]
    otherwise: list[Any] = []
    if closing[:2] == ["else", "if"]:
        node, pieces = _block(closing[1:], pieces)
        otherwise = [node]
    elif closing[0] == "else":
        otherwise, pieces = _parse(pieces)
        assert pieces[0][1] == ["end"]
        pieces = pieces[1:]
    return (tokens[0], tokens[1:], inside, otherwise), pieces


def _run(nodes: list[Any], dot: Any, names: dict[str, Any], out: list[str]) -> None:
    for kind, value, *rest in nodes:
        if kind == "text":
            out.append(value)
        elif kind == "if":
            _run(rest[0] if _value(value, dot, names) else rest[1], dot, dict(names), out)
        elif kind == "range":
            assert value[2] == ":="
            for index, item in enumerate(_value(value[3:], dot, names)):
                _run(rest[0], item, {**names, value[0]: index, value[1]: item}, out)
        elif len(value) > 1 and value[1] == ":=":
            names[value[0]] = _value(value[2:], dot, names)
        else:
            out.append(str(_value(value, dot, names)))


def _value(tokens: list[str], dot: Any, names: dict[str, Any]) -> Any:
    arguments: list[Any] = []
    tokens = list(tokens)
    while tokens:
        token = tokens.pop(0)
        if token == "(":
            depth, inner = 1, []
            while depth:
                inner.append(tokens.pop(0))
                depth += {"(": 1, ")": -1}.get(inner[-1], 0)
            arguments.append(_value(inner[:-1], dot, names))
        else:
            arguments.append(_operand(token, dot, names))
    if callable(arguments[0]):
        return arguments[0](*arguments[1:])
    assert len(arguments) == 1, tokens
    return arguments[0]


def _operand(token: str, dot: Any, names: dict[str, Any]) -> Any:
    functions: dict[str, Any] = {
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "not": lambda a: not a, "len": len,
        "slice": lambda items, start: items[start:], "and": lambda a, b: a and b,
    }  # fmt: skip
    if token in functions:
        return functions[token]
    if token.startswith('"'):
        wide = re.sub(r"\\U([0-9a-f]{8})", lambda found: chr(int(found[1], 16)), token)
        return json.loads(wide)
    if token.isdigit():
        return int(token)
    first, *path = token.split(".")
    value = names[first] if first else dot
    for part in path:
        value = value[part] if part else value
    return value
