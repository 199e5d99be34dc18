"""Targets of one export that fail, beside those that do not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from lowrank.errors import LowrankError, raise_all


class TargetFailures:
    """Targets of one export that cannot be written, each with its reason. The only one of an export raises at once."""

    def __init__(self, names: Sequence[str], notify: Callable[[str], None]) -> None:
        self.errors: dict[str, Exception] = {}
        self._names = names
        self._notify = notify

    @contextmanager
    def of(self, name: str) -> Generator[None, None, None]:
        """Whatever goes wrong in the block is this target's failure, and the others go on."""
        try:
            yield
        except Exception as error:
            if len(self._names) == 1:
                raise
            if not isinstance(error, LowrankError):  # a mistake of ours, which nobody should have to guess at
                logging.getLogger(__name__).exception("%s", name)
            self.errors[name] = error
            self._notify(f"{name}: failed, the others are still tried: {failure_text(error)}")

    def raise_if_none_is_left(self) -> None:
        """The failures of all, as one error of the first one's kind."""
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
        """As the command line says an error with --json."""
        return error_as_json(self.errors[name])


def error_as_json(error: Exception) -> dict[str, Any]:
    """`type`, `message`, and the command line's `exit_code`."""
    kind = type(error).__name__ if isinstance(error, LowrankError) else "UnexpectedError"
    code = error.exit_code if isinstance(error, LowrankError) else 1
    return {"type": kind, "message": failure_text(error), "exit_code": code}


def failure_text(error: Exception) -> str:
    """The reason in words."""
    return str(error) if isinstance(error, LowrankError) else f"{type(error).__name__}: {error}"[:2000]
