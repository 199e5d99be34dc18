"""The docstrings under the fields of a settings class, read from its source.

pydantic does the same (`use_attribute_docstrings`), but looks through all imported modules for each frame of each
class: of a cold command half a second, which grows with what is imported.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any


def field_docs(settings: type) -> dict[str, str]:
    """`{field: docstring}` of the fields that the class itself declares. To be called while its `class` statement runs;
    empty where there is no source (a prompt, a frozen program)."""
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and frame.f_globals.get("__name__") != settings.__module__:
        frame = frame.f_back
    if frame is None:
        return {}
    lines = linecache.getlines(frame.f_code.co_filename, frame.f_globals)
    own = _class_around(_parsed("".join(lines)), frame.f_lineno, settings.__name__)
    return {} if own is None else _docs(own)


@lru_cache(maxsize=1)  # the classes of a file are made one after another
def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:  # changed since it was imported
        return ast.Module([], [])


def _class_around(node: ast.AST, line: int, name: str) -> ast.ClassDef | None:
    """The innermost class of this name whose statement the line is in."""
    found = None
    inside = [*_statements(node)]
    while inside:
        each = inside.pop()
        first = min([each.lineno, *(one.lineno for one in getattr(each, "decorator_list", ()))])
        if first <= line <= (each.end_lineno or 0):
            found = each if isinstance(each, ast.ClassDef) and each.name == name else found
            inside = [*_statements(each)]
    return found


def _statements(node: ast.AST) -> Iterator[Any]:
    """What stands in a statement. A case of `match` has no lines of its own, so its statements stand for it."""
    for part in ("body", "orelse", "handlers", "finalbody"):
        yield from getattr(node, part, ())
    for case in getattr(node, "cases", ()):
        yield from case.body


def _docs(node: ast.ClassDef) -> dict[str, str]:
    found: dict[str, str] = {}
    for field, after in zip(node.body, node.body[1:]):
        match field, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = inspect.cleandoc(text)
            case _:
                pass
    return found
