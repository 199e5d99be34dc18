"""User-facing errors.

    LowrankError            a ValueError: something the user can mend
    +-- ConfigError         the configuration
    +-- DataError           the training or evaluation data
    +-- ModelError          the base model or the adapter files
    +-- OutputError         the run folder, or where an export goes
    +-- NotTheSameError     an exported model differs from what was trained

Every message says what is wrong, where, what was expected, and the way out. A check collects all it
finds and raises once, through `raise_all`. Mistakes of ours are `assert`s, not these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class LowrankError(ValueError):
    """Something the user can mend. `exit_code` is what the command line returns for it."""

    exit_code = 1


class ConfigError(LowrankError):
    """A setting is unknown, malformed, or cannot be combined with another."""

    exit_code = 2


class DataError(LowrankError):
    """The data cannot be read, or not be used for this objective."""

    exit_code = 3


class ModelError(LowrankError):
    """The base model or an adapter cannot be loaded, or cannot be trained as asked."""

    exit_code = 4


class OutputError(LowrankError):
    """The run folder is not what the command needs: not empty, not a run, or changed since."""

    exit_code = 5


class NotTheSameError(LowrankError):
    """What was exported does not behave like what was trained."""

    exit_code = 6


def raise_all(kind: type[LowrankError], heading: str, problems: Sequence[str]) -> None:
    """Raise one `kind` that lists every problem; do nothing if there is none."""
    if problems:
        raise kind("\n".join([heading, *(f"  - {problem}" for problem in problems)]))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'rank'?"`, or the list of what is known, or nothing."""
    names = sorted(str(name) for name in known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""
