"""Keywords of the front door's functions: one that is unknown, or was renamed, is refused as a setting of a file is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from lowrank.errors import ConfigError, did_you_mean, raise_all
from lowrank.peer_names import called_in_group
from lowrank.renamed import RENAMED_OPTIONS

Given = ParamSpec("Given")
Returned = TypeVar("Returned")


def known_keywords(function: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """`function`, whose callers get a ConfigError that lists every keyword it does not have, with the one that was
    meant, instead of Python's TypeError about the first."""
    names = inspect.signature(function).parameters
    called = function.__qualname__.removesuffix(".__init__")
    renamed = RENAMED_OPTIONS.get(called, {})

    @functools.wraps(function)
    def checked(*arguments: Given.args, **keywords: Given.kwargs) -> Returned:
        problems = [
            f"{name}: it is called {renamed[name]!r} now"
            if name in renamed
            else f"{name}: unknown keyword{called_in_group(name, names, called) or did_you_mean(name, names)}"
            for name in keywords
            if name not in names
        ]
        raise_all(ConfigError, f"{called}: these keywords cannot be used:", problems)
        return function(*arguments, **keywords)

    return checked
