"""What others call has a docstring: functions, classes, methods and properties without an underscore, and all that the
protocols of the seams ask for, each in its own words."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import lowrank


def _modules() -> Iterator[Any]:
    for module in pkgutil.walk_packages(lowrank.__path__, "lowrank."):
        if not module.name.endswith("__main__"):
            yield importlib.import_module(module.name)


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(kind).items()):
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        own = inspect.isfunction(function) and function.__module__ == kind.__module__
        if own and getattr(function, "__name__", "") == name and not name.startswith("_"):
            yield name, function


def _is_explained(kind: type, name: str, function: Any) -> bool:
    """By its own words, or those of the class of ours that it is from; what another package defines, that explains."""
    if function.__doc__:
        return True
    if getattr(kind, "_is_protocol", False):
        return False
    above = [each for each in kind.__mro__[1:] if name in vars(each)]
    return any(not each.__module__.startswith("lowrank.") or inspect.getdoc(vars(each)[name]) for each in above)


def test_what_is_public_is_explained() -> None:
    missing: list[str] = []
    for module in _modules():
        for name, thing in list(vars(module).items()):
            own = inspect.isfunction(thing) or isinstance(thing, type)
            if name.startswith("_") or not own or thing.__module__ != module.__name__:
                continue
            if not vars(thing).get("__doc__") and not getattr(thing, "__doc__", None):
                missing.append(f"{module.__name__}.{name}")
            if isinstance(thing, type):
                missing += [
                    f"{module.__name__}.{name}.{member}"
                    for member, function in _members(thing)
                    if not _is_explained(thing, member, function)
                ]
    assert missing == []
