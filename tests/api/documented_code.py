"""Code of a page held against what is really there, without running it: imports, attributes, keywords.

    run = lowrank.train(data=rows, max_step=20)    -> "lowrank.train has no keyword 'max_step'"
    run.metric()                                   -> "TrainedRun has no attribute 'metric'"

What a call returns is what its annotation says; where that is nothing of ours, nothing more is asked.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
import typing
from collections.abc import Mapping
from typing import Any

import lowrank
from lowrank.export import targets
from lowrank.settings import configs_in

UNKNOWN = object()
"""Somebody else's, or nothing that an annotation tells."""

_TARGETS = {name for config in configs_in(targets.__name__).values() for name in config.model_fields}
_FURTHER: dict[str, tuple[str, set[str]]] = {
    "train": ("settings", set(lowrank.RunConfig.model_fields)),
    "TrainedRun.resume": ("changes", set(lowrank.RunConfig.model_fields)),
    "TrainedRun.load": ("options", set(inspect.signature(lowrank.load).parameters)),
    "TrainedRun.export": ("options", {*inspect.signature(lowrank.export).parameters, *_TARGETS}),
    "LiveRun.add": ("changes", set(lowrank.JobConfig.model_fields)),
    "generate": ("sampling", set(lowrank.GenerationConfig.model_fields)),
    "Model.generate": ("sampling", set(lowrank.GenerationConfig.model_fields)),
    "Model.answers": ("sampling", set(lowrank.GenerationConfig.model_fields)),
    "Model.compare": ("sampling", set(lowrank.GenerationConfig.model_fields)),
    "export": ("settings", _TARGETS),
}
"""What goes by `**name` of a function of ours."""


def problems_in(code: str, known: Mapping[str, Any] | None = None) -> list[str]:
    """Everything that `code` asks of us and is not there. `known`: names that it does not define. SyntaxError for what
    is no Python."""
    reader = _Reader(dict(known or {}))
    reader.visit(ast.parse(code))
    return reader.problems


class _Reader(ast.NodeVisitor):
    """`names`: what stands behind a name: an object of ours, `_Instance` of a class of ours, or UNKNOWN."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names, self.problems = names, []

    def visit_Import(self, node: ast.Import) -> None:
        for each in node.names:
            if each.name.partition(".")[0] == "lowrank":
                self._import(each.name)
                self.names[each.asname or "lowrank"] = importlib.import_module(each.name if each.asname else "lowrank")
            else:
                self.names[each.asname or each.name.partition(".")[0]] = UNKNOWN

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = self._import(node.module or "") if (node.module or "").partition(".")[0] == "lowrank" else None
        for each in node.names:
            found = getattr(module, each.name, None) if module is not None else UNKNOWN
            if found is None:
                found = self._import(f"{node.module}.{each.name}")
            self.names[each.asname or each.name] = UNKNOWN if found is None else found

    def _import(self, name: str) -> Any:
        try:
            return importlib.import_module(name)
        except ImportError:
            self.problems.append(f"there is no {name} to import")
            return None

    def visit_Assign(self, node: ast.Assign) -> None:
        value = self._value(node.value)
        for target in node.targets:
            self._bind(target, value)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            opened = self._value(item.context_expr)
            if item.optional_vars is not None:
                self._bind(item.optional_vars, _returned(getattr(_class_of(opened), "__enter__", UNKNOWN)))
        for statement in node.body:
            self.visit(statement)

    def visit_For(self, node: ast.For) -> None:
        items = self._value(node.iter)
        self._bind(node.target, items.item if isinstance(items, _Several) else UNKNOWN)
        for statement in [*node.body, *node.orelse]:
            self.visit(statement)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """In its body, its parameters are somebody else's."""
        for each in [*node.decorator_list, *node.args.defaults]:
            self._value(each)
        self.names[node.name] = UNKNOWN
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        inner = _Reader({**self.names, **{each.arg: UNKNOWN for each in given if each is not None}})
        for statement in node.body:
            inner.visit(statement)
        self.problems += inner.problems

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for each in node.bases:
            self._value(each)
        inner = _Reader(dict(self.names))
        for statement in node.body:
            inner.visit(statement)
        self.problems += inner.problems
        self.names[node.name] = UNKNOWN

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.expr):
            self._value(node)
        else:
            super().generic_visit(node)

    def _bind(self, target: ast.expr, value: Any) -> None:
        for each in ast.walk(target):
            if isinstance(each, ast.Name):
                self.names[each.id] = value if each is target else UNKNOWN

    def _value(self, node: ast.expr) -> Any:
        """What an expression gives; its parts are looked at on the way."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, UNKNOWN)
        if isinstance(node, ast.Attribute):
            return self._attribute(self._value(node.value), node.attr)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp, ast.Lambda)):
            names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
            bound = {each.id: UNKNOWN for each in names if isinstance(each.ctx, ast.Store)}
            inner = _Reader({**self.names, **bound})
            for child in ast.iter_child_nodes(node):
                inner.visit(child)
            self.problems += inner.problems
            return UNKNOWN
        for child in ast.iter_child_nodes(node):
            self.visit(child)
        return UNKNOWN

    def _attribute(self, owner: Any, name: str) -> Any:
        if owner is UNKNOWN or isinstance(owner, (_Several, _Method)):
            return UNKNOWN
        kind = _class_of(owner)
        where = kind.__name__ if kind is not None else getattr(owner, "__name__", str(owner))
        if kind is None:
            found = getattr(owner, name, None)
            if found is None:
                self.problems.append(f"{where} has no attribute {name!r}")
            return UNKNOWN if found is None else found
        member = inspect.getattr_static(kind, name, None)
        if isinstance(member, property):
            return _returned(member.fget)
        if member is not None:
            return _Method(member) if inspect.isfunction(member) else getattr(kind, name)
        if name not in _fields_of(kind):
            self.problems.append(f"{where} has no attribute {name!r}")
        return UNKNOWN

    def _call(self, node: ast.Call) -> Any:
        called = self._value(node.func)
        for each in [*node.args, *(keyword.value for keyword in node.keywords)]:
            self._value(each)
        bound = isinstance(called, _Method)
        if isinstance(called, _Method):
            called = called.function
        if called is UNKNOWN or not callable(called):
            return UNKNOWN
        self._check_keywords(called, node, 1 if bound else 0)
        return _Instance(called) if isinstance(called, type) else _returned(called)

    def _check_keywords(self, called: Any, node: ast.Call, bound: int) -> None:
        name = getattr(called, "__qualname__", getattr(called, "__name__", str(called)))
        name = name.rpartition("lowrank.")[2]
        try:
            parameters = list(inspect.signature(called).parameters.values())[bound:]
        except ValueError:  # an exception's
            return
        by_place = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
        open_ended = any(each.kind is each.VAR_POSITIONAL for each in parameters)
        if len(node.args) > len(by_place) and not (open_ended or any(isinstance(e, ast.Starred) for e in node.args)):
            self.problems.append(f"{name} takes {len(by_place)} arguments by place, not {len(node.args)}")
        names = {each.name for each in parameters}
        further = next((each.name for each in parameters if each.kind is each.VAR_KEYWORD), None)
        if further is not None and getattr(called, "__module__", "").startswith("lowrank.compat."):
            return  # another program's front: what it does not know it names itself
        if further is not None:
            assert name in _FURTHER, f"{name}(**{further}): say here what goes by it"
            names |= _FURTHER[name][1]
        for keyword in node.keywords:
            if keyword.arg is not None and keyword.arg not in names:
                self.problems.append(f"{name} has no keyword {keyword.arg!r}")


class _Instance:
    """An object of a class of ours."""

    def __init__(self, kind: type) -> None:
        self.kind = kind


class _Method:
    """A function of the class of an object: its first parameter is that."""

    def __init__(self, function: Any) -> None:
        self.function = function


class _Several:
    """A list of them."""

    def __init__(self, item: Any) -> None:
        self.item = item


def _class_of(value: Any) -> type | None:
    return value.kind if isinstance(value, _Instance) else None


def _returned(function: Any) -> Any:
    """What a function gives, by its annotation."""
    if inspect.ismodule(function):  # a package that is called
        name = function.__name__.rpartition(".")[2]
        function = getattr(importlib.import_module(lowrank.OFFERED[name]), name)
    try:
        given = typing.get_type_hints(function).get("return", UNKNOWN)
    except (NameError, TypeError):  # what only a type checker imports
        return UNKNOWN
    if typing.get_origin(given) in (list, tuple) and typing.get_args(given):
        return _Several(_one(typing.get_args(given)[0]))
    return _one(given)


def _one(annotation: Any) -> Any:
    ours = isinstance(annotation, type) and annotation.__module__.partition(".")[0] == "lowrank"
    return _Instance(annotation) if ours else UNKNOWN


def _fields_of(kind: type) -> set[str]:
    """Attributes of its objects: what it annotates, and what its methods set."""
    found: set[str] = set()
    for each in kind.__mro__:
        if each.__module__.partition(".")[0] == "lowrank":
            found |= set(inspect.get_annotations(each))
            body = ast.parse(textwrap.dedent(inspect.getsource(each)))
            stored = (node for node in ast.walk(body) if isinstance(node, ast.Attribute))
            found |= {node.attr for node in stored if isinstance(node.ctx, ast.Store)}
    return found
