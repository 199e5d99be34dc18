"""Failures of single export targets, which do not stop the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from lowrank.errors import LowrankError, raise_all


class TargetFailures:
    """Collects the failures of an export's targets. A failure of the only target is raised at once."""

    def __init__(self, names: Sequence[str], notify: Callable[[str], None]) -> None:
        self.errors: dict[str, Exception] = {}
        self._names = names
        self._notify = notify

    @contextmanager
    def of(self, name: str) -> Generator[None, None, None]:
        """Context in which any error counts as the failure of this target, so that the others continue."""
        try:
            yield
        except Exception as error:
            if len(self._names) == 1:
                raise
            if not isinstance(error, LowrankError):  # a bug of ours, so its traceback is logged
                logging.getLogger(__name__).exception("%s", name)
            self.errors[name] = error
            self._notify(f"{name}: failed, the others are still tried: {failure_text(error)}")

    def raise_if_none_is_left(self) -> None:
        """If all targets have failed, raise one error of the first one's class that lists them."""
        if len(self.errors) < len(self._names):
            return
        first = next(iter(self.errors.values()))
        kind = type(first) if isinstance(first, LowrankError) else LowrankError
        reasons = [f"{name}: {failure_text(error)}" for name, error in self.errors.items()]
        try:
            raise_all(kind, "these targets cannot be written:", reasons)
        except LowrankError as error:
            raise error from first

    def to_json(self, name: str) -> dict[str, Any]:
        """Return the failure of a target as the command line prints errors with --json."""
        return error_as_json(self.errors[name])


def error_as_json(error: Exception) -> dict[str, Any]:
    """Return an error as `type`, `message`, and the command line's `exit_code`."""
    kind = type(error).__name__ if isinstance(error, LowrankError) else "UnexpectedError"
    code = error.exit_code if isinstance(error, LowrankError) else 1
    return {"type": kind, "message": failure_text(error), "exit_code": code}


def failure_text(error: Exception) -> str:
    """Return the message of an error; with its class if it is not a LowrankError."""
    return str(error) if isinstance(error, LowrankError) else f"{type(error).__name__}: {error}"[:2000]
