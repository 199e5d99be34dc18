"""The sentences that stand in our own source, with `{1}`, `{2}` where values come in: what a Chinese page must know."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

_RAISED_BY = ("HTTPException", "OutsideError", "ConfigError", "OutputError", "LowrankError", "ValueError", "_no")


def raised(path: Path) -> Iterator[str]:
    """The messages of the errors that a module raises, or answers with."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _RAISED_BY:
            for argument in node.args:
                yield from _texts(argument)


def returned(path: Path, *functions: str) -> Iterator[str]:
    """What these functions of a module return or yield."""
    for function in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(function, ast.FunctionDef) and function.name in functions:
            for node in ast.walk(function):
                if isinstance(node, (ast.Return, ast.Yield)) and node.value is not None:
                    yield from _texts(node.value)


def _texts(node: ast.expr) -> Iterator[str]:
    """The texts an expression may be: both of a choice, and none where it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield from _joined(node.values, 1)
    elif isinstance(node, ast.IfExp):
        yield from _texts(node.body)
        yield from _texts(node.orelse)


def _joined(parts: list[ast.expr], number: int) -> Iterator[str]:
    if not parts:
        yield ""
        return
    first, *rest = parts
    if isinstance(first, ast.Constant):
        found, following = [str(first.value)], number
    else:
        found, following = [f"{{{number}}}"], number + 1
    for beginning in found:
        for end in _joined(rest, following):
            yield beginning + end
