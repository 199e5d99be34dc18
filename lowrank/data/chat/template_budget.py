"""What one rendering of a chat template may cost: processor time, the size of one value, and of all values together.

A template comes with a model of strangers and is a program. Real ones need milliseconds and write about as much as the
conversation holds; the limits grow with that, and are far above it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from lowrank.errors import ModelError

SECONDS = 10.0
"""Of this thread's processor time."""
LONGEST_TEMPLATE = 1 << 18
"""Characters. The longest that published models have are below 40,000."""
_ONE_VALUE, _ALL_VALUES = 4 << 20, 64 << 20
"""Characters, or eighths of a list's entries, beyond what the conversation adds."""
_BETWEEN_LOOKS = 2048
"""Steps from one look at the clock to the next."""
_INTEGER_BITS = 1 << 16


class TemplateCostsTooMuch(ModelError):
    """The template loops or grows beyond every use of one; the message says how."""


class Budget:
    """Counts what one rendering does. `given`: characters of the conversation; `turns`: its messages.

    written   characters written so far
    blocks    what the template marked as generated, if that is asked for
    """

    def __init__(self, given: int, turns: int) -> None:
        self.largest = _ONE_VALUE + 8 * given
        self._left = _ALL_VALUES + given * (turns + 8)
        self._until_look = _BETWEEN_LOOKS
        self._end = time.thread_time() + SECONDS
        self.written = 0
        self.blocks: list[tuple[int, int]] = []

    def step(self, number: int = 1) -> None:
        """So many steps of a loop, calls, or values looked at."""
        self._until_look -= number
        if self._until_look <= 0:
            self._until_look = _BETWEEN_LOOKS
            if time.thread_time() > self._end:
                raise TemplateCostsTooMuch(f"it computes for more than {SECONDS:.0f} seconds")

    def expect(self, size: int) -> None:
        """Before a value of this size is made."""
        if size > self.largest:
            raise TemplateCostsTooMuch(
                f"it makes one value of {size:,} characters or entries, more than {self.largest:,}"
            )

    def made(self, value: Any) -> None:
        """After a value was made."""
        if isinstance(value, (str, bytes)):
            self.grew(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.grew(8 * len(value))
        else:
            self.step()

    def grew(self, size: int) -> None:
        """So many characters were made."""
        self._left -= size
        self._until_look -= 1 + size // 1024
        if self._until_look <= 0 or self._left < 0 or size > self.largest:
            self.expect(size)
            if self._left < 0:
                raise TemplateCostsTooMuch("it makes more text than any conversation of this length needs")
            self.step(0)

    def integer(self, bits: int) -> None:
        """Before an integer of so many bits is made."""
        if bits > _INTEGER_BITS:
            raise TemplateCostsTooMuch(f"it makes a number of {bits:,} bits")

    def weigh(self, value: Any) -> int:
        """Characters and entries of a value with all that it holds, however often it holds the same."""
        if isinstance(value, (str, bytes)):
            return len(value)
        if not isinstance(value, (list, tuple, dict, set)):
            return 1
        weight, waiting = 0, list[Any]([value])
        while waiting:
            each = waiting.pop()
            if isinstance(each, Mapping):
                weight += len(each)
                waiting += [*each.keys(), *each.values()]
            elif isinstance(each, (list, tuple, set)):
                weight += len(each)
                waiting += each
            elif isinstance(each, (str, bytes)):
                weight += len(each)
            else:
                weight += 1
            self.step()
            self.expect(max(weight, len(waiting)))
        return weight


BUDGET: ContextVar[Budget] = ContextVar("chat_template_budget")
"""Of the rendering that runs."""


def budget() -> Budget:
    """Of the rendering that runs; of a compilation, one of its own."""
    return BUDGET.get(None) or Budget(0, 0)
