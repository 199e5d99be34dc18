"""The one door for code that is not ours.

Settings may name code: `my_module:MyThing` as a type, a reward function, a format, a reporter; and a model may bring
Python of its own (`trust_remote_code`). Naming it runs nothing. It runs where a person has said so in this very
command: `--allow-code`, or, in Python, `allow_code=True` or `with code_allowed():`. What a file says (somebody's run
folder, a YAML from the web) never opens the door. Every such import goes through `load_code`.

A permission holds for the code inside the `with`, in its thread. An object that a person hands to a call in Python
(their reward function itself, not its name) needs none: it is there already. It goes by a name in the settings for as
long as that call lasts (`objects_given`), so that no file can mean it later.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from lowrank.errors import ConfigError

ALLOW_CODE_HINT = "read that code, then add --allow-code to the command (in Python: allow_code=True)"
PASS_OBJECTS_HINT = (
    "an object that a run was given in Python is given again: lowrank.TrainedRun(RUN).resume(objects=[...]), or "
    "lowrank.train of the same settings with resume=True"
)
_IN_A_SCRIPT = "__main__:"
"""Such names mean something else in every process."""

_allowed: ContextVar[bool] = ContextVar("lowrank_code_allowed", default=False)


_given: ContextVar[Mapping[str, Any]] = ContextVar("lowrank_objects_given", default=MappingProxyType({}))


class CodeRefused(ConfigError):
    """A setting names code that the person has not allowed to run."""


@contextmanager
def code_allowed(allowed: bool = True) -> Generator[None, None, None]:
    """Inside, code that settings name is run. With False nothing changes: what is allowed outside stays allowed."""
    token = _allowed.set(allowed or _allowed.get())
    try:
        yield
    finally:
        _allowed.reset(token)


def code_is_allowed() -> bool:
    """Whether a person has opened the door."""
    return _allowed.get()


@contextmanager
def objects_given(objects: Mapping[str, Any]) -> Generator[None, None, None]:
    """Inside, these names (`my_module:MyThing`) mean these objects, which the person handed to the call."""
    token = _given.set({**_given.get(), **objects})
    try:
        yield
    finally:
        _given.reset(token)


def may_run(name: str) -> bool:
    """Whether what `name` names is run: a person has opened the door, or handed over the object itself."""
    return code_is_allowed() or name in _given.get()


def names_code(name: object) -> bool:
    """Whether a setting's value is of the form `my_module:MyThing`."""
    module, colon, attribute = str(name).partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


NAME_CODE = ("type", "format", "reward_funcs", "report_to")
"""Settings that may name code."""


def code_named(settings: Any, looks_at: Callable[[str], bool] = NAME_CODE.__contains__) -> Iterator[tuple[str, str]]:
    """`(jobs.0.objective.type, my_module:MyThing)` of every setting that names code, in plain settings whose groups are
    spelled out. `looks_at`: which settings, by their last name."""
    for place, text in texts_in(settings):
        setting = next((part for part in reversed(place.split(".")) if not part.isdecimal()), "")
        if names_code(text) and looks_at(setting):
            yield place, text


def texts_in(settings: Any, above: str = "") -> Iterator[tuple[str, str]]:
    """`(data.train.0.path, rows.json)` of every text in plain settings."""
    if isinstance(settings, str):
        yield above, settings
    elif isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from texts_in(value, f"{above}.{key}" if above else str(key))
    elif isinstance(settings, (list, tuple)):
        for number, value in enumerate(settings):
            yield from texts_in(value, f"{above}.{number}")


def refusal(name: str) -> str:
    """Why `name` is not run, and the way out."""
    way_out = PASS_OBJECTS_HINT if name.startswith(_IN_A_SCRIPT) else ALLOW_CODE_HINT
    return f"{name!r} is code that does not come with lowrank, and settings alone run none; {way_out}"


def load_code(name: str) -> Any:
    """What `my_module:MyThing` names. The current folder is searched last, so that it hides nothing.

    CodeRefused where it is not allowed, and nothing is imported then; ConfigError where there is no such thing.
    """
    if not names_code(name):
        raise ConfigError(f"{name!r} names no code; write my_module:MyThing")
    if name in _given.get():
        return _given.get()[name]
    if not code_is_allowed():
        raise CodeRefused(refusal(name))
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a module does when it is imported
        reason = str(error) if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"cannot import {name!r}: {reason}; is its folder on PYTHONPATH?") from error


def call_problem(function: Any, *arguments: str) -> str | None:
    """Why `function` cannot be called with arguments of these names in this order: `takes (row), and is called with
    (row, columns, tags)`; None where it can, or where that cannot be known."""
    if inspect.iscoroutinefunction(function):
        return "is `async def`, whose calls give no result; make it a plain function"
    signature = signature_of(function)
    try:
        if signature is not None:
            signature.bind(*arguments)
    except TypeError:
        assert signature is not None
        return f"takes {parameters_of(signature)}, and is called with ({', '.join(arguments)})"
    return None


def signature_of(function: Any) -> inspect.Signature | None:
    """Its signature; None where it cannot be known, as of some that are built in."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def parameters_of(signature: inspect.Signature) -> str:
    """`(row, columns=None)`: without annotations."""
    plain = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))
