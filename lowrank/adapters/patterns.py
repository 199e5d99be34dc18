"""Regular expressions from settings and adapter files, over names of modules: compiled when they are read, matched in
bounded time. `regex` reads what `re` reads, which PEFT uses, and can be given a limit."""

from __future__ import annotations

import regex

from lowrank.errors import ModelError

SECONDS = 2.0
"""One name takes microseconds; an expression that takes longer backtracks without end."""
_LONGEST = 10_000


def pattern_problem(pattern: str) -> str | None:
    """Why it is no regular expression; None if it is one."""
    if len(pattern) > _LONGEST:
        return f"a regular expression of {len(pattern):,} characters; {_LONGEST:,} is the most"
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        return f"{pattern[:80]!r} is no regular expression: {error}"
    return None


def whole(pattern: str, name: str) -> bool:
    """Whether it matches all of the name. ModelError if it cannot be compiled, or takes too long."""
    problem = pattern_problem(pattern)
    if problem:
        raise ModelError(problem)
    try:
        return regex.fullmatch(pattern, name, timeout=SECONDS) is not None
    except TimeoutError:
        raise ModelError(
            f"the regular expression {pattern[:80]!r} takes more than {SECONDS:g} s for {name!r}: nested repetitions "
            "such as (a+)+ backtrack without end; write a list of names instead"
        ) from None


def at_the_end(pattern: str, name: str) -> bool:
    """PEFT's rule for keys of rank_pattern and alpha_pattern: the whole name, or what follows a dot in it."""
    return whole(rf"(.*\.)?(?:{pattern})$", name)
