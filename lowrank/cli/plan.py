"""`lowrank plan`: what a run would need and how long it would take, before any weights load."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank.cli.warn import warn

if TYPE_CHECKING:
    from lowrank.config import RunConfig
    from lowrank.data.prepare import Prepared
    from lowrank.planning.plan import Plan, Planner

_PARTS = {
    "base": "base, frozen",
    "adapters": "adapters: float32 masters, copies that compute",
    "optimizer": "optimiser state",
    "gradients": "gradients",
    "activations": "activations kept for the backward pass",
    "loss": "loss over the vocabulary",
    "workspace": "temporaries of attention, unpacking, the rest",
}


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML or JSON file, native or LLaMA-Factory's.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As micro_batch_tokens=1024.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Time a few layers with random weights, for the speed.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Reads the data and the model's config.json. The memory is that of the heaviest optimiser step.

    What the settings leave open (recompute and micro_batch_tokens: auto) is chosen as `lowrank train` would.
    """
    from lowrank.compat import load_any
    from lowrank.models.loading import load_tokenizer
    from lowrank.planned import planner_of
    from lowrank.planning.choose import choose
    from lowrank.prepared import prepare_all

    settings, warnings = load_any(config, overrides or [])
    warn(warnings)
    data = prepare_all(settings.jobs, load_tokenizer(settings.model), lambda event: None, strict=False)
    planner = planner_of(settings, data)
    chosen = choose(planner, settings.micro_batch_tokens, settings.model.recompute)
    found = _what_fits(planner, chosen, settings) | {"plan": chosen.as_dict(), "speed": None}
    if calibrate:
        found["speed"] = _speed(planner, chosen, settings, data)
    if json:
        print(json_format.dumps(found, ensure_ascii=False))
    else:
        _show(chosen, found)


def _what_fits(planner: Planner, chosen: Plan, config: RunConfig) -> dict[str, Any]:
    """The limits of this machine for this run, and, where it does not fit, the changes that would help."""
    from lowrank.planned import open_settings
    from lowrank.planning.changes import changes_that_fit
    from lowrank.planning.reach import largest_tokens, longest_document

    return {
        "largest_micro_batch_tokens": largest_tokens(planner, chosen),
        "longest_document_tokens": longest_document(planner, chosen),
        "changes_that_fit": [] if chosen.fits else changes_that_fit(planner, chosen, open_settings(config)),
    }


def _speed(planner: Planner, chosen: Plan, config: RunConfig, data: list[Prepared]) -> dict[str, Any]:
    from lowrank.planned import tokens_to_train
    from lowrank.planning.speed import calibrate

    speed = calibrate(planner.memory, chosen)
    tokens = tokens_to_train(config.jobs, data)
    return {
        "tokens_per_second": round(speed.tokens_per_second, 1),
        "tokens_to_train": tokens,
        "seconds_to_train": round(tokens / speed.tokens_per_second, 1),
    }


def _show(chosen: Plan, found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from lowrank.planning.wording import duration, gigabytes, recompute_in_words

    console = Console(highlight=False)
    table = Table("memory", "", title=f"the heaviest step, on {chosen.device}", title_justify="left")
    table.columns[1].justify = "right"
    for name, words in _PARTS.items():
        table.add_row(words, gigabytes(getattr(chosen.step, name)))
    if chosen.process:
        table.add_row("Python, libraries, data, the allocator", gigabytes(chosen.process))
    table.add_row("while loading", gigabytes(chosen.loading), style="dim")
    mark = "green" if chosen.fits else "red"
    table.add_row("peak", f"[{mark}]{gigabytes(chosen.peak)}[/]", style="bold")
    table.add_row("free, with what this process holds", gigabytes(chosen.available))
    console.print(table)
    passes = f"{chosen.forward_passes} forward pass{'es' if chosen.forward_passes > 1 else ''} a step"
    console.print(
        f"Runs with    micro_batch_tokens: {chosen.micro_batch_tokens} ({passes}), model.recompute: "
        f"{chosen.recompute} ({recompute_in_words(chosen.recompute)})"
    )
    console.print(
        f"Would fit    forward passes of {found['largest_micro_batch_tokens']:,} tokens; documents of "
        f"{found['longest_document_tokens']:,} tokens"
    )
    speed = found["speed"]
    if speed:
        console.print(
            f"Speed        about {speed['tokens_per_second']:,.0f} tokens a second, "
            f"{duration(speed['seconds_to_train'])} for {speed['tokens_to_train']:,} tokens"
        )
    else:
        console.print("Speed        not measured; --calibrate times a few layers")
    if not chosen.fits:
        console.print("[red]It does not fit.[/]")
        for change in found["changes_that_fit"]:
            console.print(f"  - {change}")
