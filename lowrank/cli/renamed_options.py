"""Options that had other names: a command line that says the old one is refused with the new one in the message."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank.errors import ConfigError, raise_all

RENAMED_OPTIONS: dict[str, dict[str, str]] = {
    "serve": {
        "--resident": "--max-loras",
        "--at-once": "--max-num-seqs",
        "--cache-tokens": "--kv-cache-tokens",
    },
}
"""By command: old -> new."""


def refuse_renamed(command: str, arguments: Sequence[str]) -> None:
    """ConfigError lists the options of `arguments` that are called something else now."""
    renamed = RENAMED_OPTIONS.get(command, {})
    given = [argument.partition("=")[0] for argument in arguments]
    problems = [f"{name} is called {renamed[name]!r} now" for name in given if name in renamed]
    raise_all(ConfigError, f"lowrank {command}", problems)
