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
import errno
import re
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager


class LowrankError(ValueError):
    """Something the user can mend. `exit_code` is what the command line returns for it."""

    exit_code = 1
    problems: tuple[str, ...] = ()
    """Where a check found several: a line for each, as they stand below the first line of the message."""


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


_NO_SPACE = re.compile(
    r"no space left on device|os error (28|112|122)\b|disk quota exceeded|not enough space on the disk", re.IGNORECASE
)
"""As systems and the libraries that write for us say it."""


def is_disk_full_message(text: str) -> bool:
    """Whether the words of an error are those of a full disk or quota."""
    return _NO_SPACE.search(text) is not None


def is_disk_full(error: BaseException | None) -> bool:
    """Whether it, or what it came from, is a disk or a quota that is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if not isinstance(error, LowrankError) and is_disk_full_message(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def explain_disk_full() -> Generator[None, None, None]:
    """A full disk in the block becomes an OutputError; everything else passes."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        name = getattr(error, "filename", None)
        where = f" for {name}" if name else ""
        raise OutputError(
            f"the disk is full: there is no space left{where}. What was whole before is still there; free some space "
            "and run the command again (a training run goes on with resume=true)"
        ) from None


@contextmanager
def explain_bad_paths() -> Generator[None, None, None]:
    """A path that no file can have becomes a ConfigError; everything else passes."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise ConfigError(f"{error.filename}: no path of a file ({error.strerror})") from None
    except ValueError as error:
        if isinstance(error, LowrankError) or "null byte" not in str(error):
            raise
        raise ConfigError("a path has a zero byte in it, which no path of a file has") from None


_OF_THE_NETWORK = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Packages whose errors are the network's, by which the hub's client goes."""


@contextmanager
def explain_lost_network() -> Generator[None, None, None]:
    """A download that breaks off becomes a ModelError; everything else passes."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LowrankError) or type(error).__module__.partition(".")[0] not in _OF_THE_NETWORK:
            raise
        raise ModelError(
            f"the network broke off ({str(error)[:300] or type(error).__name__}); what came whole is kept, so run the "
            "command again"
        ) from error


_LONG_TOKEN = re.compile(r"\S{600,}")


def shortened(text: str) -> str:
    """Without the middle of words that are as long as a page: a path, a key or a name that somebody made up."""
    return _LONG_TOKEN.sub(lambda match: f"{match[0][:80]}...{match[0][-80:]} ({len(match[0]):,} characters)", text)


def first_line(error: BaseException, most: int | None = 200) -> str:
    """What a library says, for a sentence of ours: the first line with something in it, or the error's type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:most]


def raise_all(kind: type[LowrankError], heading: str, problems: Sequence[str]) -> None:
    """Raise one `kind` that lists every problem; do nothing if there is none."""
    if problems:
        error = kind("\n".join([heading, *(f"  - {problem}" for problem in problems)]))
        error.problems = tuple(problems)
        raise error


def near(given: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `given` was probably meant to be: the same but for case and blanks, or a slip."""
    names = sorted(str(name) for name in known)
    plain = given.strip().lower()
    same = [name for name in names if name.strip().lower() == plain]
    return next(iter(same or difflib.get_close_matches(plain, names, n=1, cutoff=0.75)), None)


def did_you_mean(given: str, known: Iterable[str], page: str | None = None) -> str:
    """`"; did you mean 'rank'?"`, or the list of what is known, or nothing. With a `page` of the documentation that has
    them all, it is named instead of more than a few."""
    names = sorted(str(name) for name in known)
    plain = plain_name(given[:200])
    same = [name for name in names if plain_name(name) == plain]
    close = same or difflib.get_close_matches(given[:200], names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    if len(names) > (MOST_NAMES if page is None else NEAREST):
        nearest = difflib.get_close_matches(given[:200], names, n=NEAREST, cutoff=0.0)
        where = "" if page is None else f"; all are in {page}"
        return f"; {len(names)} are known, the nearest are {', '.join(nearest)}{where}"
    return f"; known: {', '.join(names)}" if names else ""


def plain_name(name: str) -> str:
    """As everybody would write it: LoRA and lora, all_linear and all-linear are one name."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


MOST_NAMES = 40
"""More than these are not listed."""
NEAREST = 5
