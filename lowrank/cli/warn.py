"""Warnings for the person at the terminal; stdout stays free for results."""

from __future__ import annotations

from collections.abc import Iterable

import typer

from lowrank.terminal import visible


def warn(warnings: Iterable[str]) -> None:
    """One line each, on stderr."""
    for warning in warnings:
        typer.secho(f"warning: {visible(warning)}", fg=typer.colors.YELLOW, err=True)
