"""Options that had other names: a command line that says the old one is refused with the new one in the message."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank.errors import ConfigError, raise_all
from lowrank.renamed import RENAMED_OPTIONS


def refuse_renamed(command: str, arguments: Sequence[str]) -> None:
    """ConfigError lists the options of `arguments` that are called something else now."""
    renamed = {_option(old): _option(new) for old, new in RENAMED_OPTIONS.get(command, {}).items()}
    given = [argument.partition("=")[0] for argument in arguments]
    problems = [f"{name} is called {renamed[name]!r} now" for name in given if name in renamed]
    raise_all(ConfigError, f"lowrank {command}", problems)


def _option(keyword: str) -> str:
    return f"--{keyword.replace('_', '-')}"
