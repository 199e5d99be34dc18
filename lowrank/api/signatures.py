"""What docs/api.md shows of functions and classes: signatures with types and defaults, and where a named type is."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

_WIDEST = 110
_LONGEST_DEFAULT = 40

Origin = tuple[str, str]
"""Module and name there."""


def signature(name: str, function: Any, *, own: bool = False) -> str:
    """`name(first: str, *, second: int = 3) -> str`, on several lines where it is long; `own`: without `self`."""
    found = inspect.signature(function)
    given = [each for each in found.parameters.values() if not (own and each.name == "self")]
    parts: list[str] = []
    for each in given:
        if each.kind is inspect.Parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        parts.append(_parameter(each))
    gives = _gives(found.return_annotation)
    line = f"{name}({', '.join(parts)}){gives}"
    if len(line) <= _WIDEST:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){gives}"])


def property_of(name: str, member: property) -> str:
    """`name: type`."""
    return f"{name}{_gives(inspect.signature(member.fget).return_annotation).replace(' ->', ':', 1)}"  # type: ignore[arg-type]


def _gives(annotation: Any) -> str:
    return f" -> {annotation}" if annotation not in (inspect.Signature.empty, "None", None) else ""


def _parameter(each: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(each.kind, "")
    kind = "" if each.annotation is inspect.Parameter.empty else f": {each.annotation}"
    if each.default is inspect.Parameter.empty:
        return f"{stars}{each.name}{kind}"
    default = each.default.__name__ if inspect.isfunction(each.default) else repr(each.default)
    shown = default if len(default) <= _LONGEST_DEFAULT else "..."
    return f"{each.name}{kind} = {shown}" if kind else f"{each.name}={shown}"


def fields(kind: type) -> Iterator[tuple[str, str]]:
    """Annotated attributes, `name: type = default`, each with the string that stands below it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    for statement, after in zip(body.body, [*body.body[1:], None]):
        if isinstance(statement, ast.AnnAssign) and not ast.unparse(statement.target).startswith("_"):
            default = _default(statement.value)
            shown = f" = {default}" if default else ""
            yield f"{ast.unparse(statement.target)}: {_plain(statement.annotation)}{shown}", _text_of(after)


def _default(value: ast.expr | None) -> str:
    """As a person writes it: `field(default_factory=dict)` is `{}`."""
    if not isinstance(value, ast.Call):
        return ast.unparse(value) if value is not None else ""
    given = {each.arg: ast.unparse(each.value) for each in value.keywords}
    if "default_factory" in given:
        return {"dict": "{}", "list": "[]", "tuple": "()"}.get(
            given["default_factory"], f"{given['default_factory']}()"
        )
    if ast.unparse(value.func) in ("field", "Field"):
        return given.get("default", ast.unparse(value.args[0]) if value.args else "")
    return ast.unparse(value)


def _plain(annotation: ast.expr) -> str:
    """Without the limits that `Annotated` adds."""
    if isinstance(annotation, ast.BinOp):
        return f"{_plain(annotation.left)} | {_plain(annotation.right)}"
    limited = isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated"
    return ast.unparse(annotation.slice.elts[0] if limited else annotation)  # type: ignore[attr-defined, union-attr]


def _text_of(statement: ast.stmt | None) -> str:
    documented = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    text = statement.value.value if documented else None  # type: ignore[union-attr]
    return inspect.cleandoc(text) if isinstance(text, str) else ""


def alias(origin: Origin) -> tuple[str, str]:
    """`Totals = dict[str, float]`, and the string that stands below it."""
    statements = list(_statements(origin[0]))
    for statement, after in zip(statements, [*statements[1:], None]):
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == origin[1]:
            value = statement.value
            limited = isinstance(value, ast.Subscript) and ast.unparse(value.value) in ("Annotated", "Union")
            if isinstance(value, ast.Subscript) and limited and isinstance(value.slice, ast.Tuple):
                every = value.slice.elts if ast.unparse(value.value) == "Union" else [*value.slice.elts[:1]]
                return f"{origin[1]} = {' | '.join(ast.unparse(each) for each in every)}", _text_of(after)
            return f"{origin[1]} = {ast.unparse(value)}", _text_of(after)
        if isinstance(statement, ast.ClassDef) and statement.name == origin[1]:  # what type checkers see of a choice
            return origin[1], ast.get_docstring(statement) or ""
    raise AssertionError(f"{origin}: no alias of a type")


def types_in(annotation: str, module: str) -> Iterator[Origin]:
    """Where the types of ours are that `annotation` names, as it is written in `module`."""
    for node in ast.walk(ast.parse(annotation)):
        origin = _origin(node.id, module) if isinstance(node, ast.Name) else None
        if origin is not None:
            yield origin


def _origin(name: str, module: str) -> Origin | None:
    """None for what is built in, or another package's."""
    for statement in _statements(module):
        if isinstance(statement, ast.ImportFrom):
            there = next((each.name for each in statement.names if (each.asname or each.name) == name), None)
            if there is not None:
                ours = str(statement.module).partition(".")[0] == "lowrank"
                return _origin(there, str(statement.module)) if ours else None
        defined = [statement.name] if isinstance(statement, ast.ClassDef) else []
        if isinstance(statement, ast.Assign):
            defined = [ast.unparse(each) for each in statement.targets]
        if name in defined:
            return module, name
    return None


@cache
def _statements(module: str) -> tuple[ast.stmt, ...]:
    """Of the module, those under `if TYPE_CHECKING` in their place."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    found: list[ast.stmt] = []
    for statement in tree.body:
        found += statement.body if isinstance(statement, ast.If) else [statement]
    return tuple(found)
