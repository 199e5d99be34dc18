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
    from lowrank.planning.machine import Machine
    from lowrank.planning.plan import MemoryPlan, Planner

_PARTS = {
    "base": "base, frozen",
    "adapters": "adapters: float32 masters, copies that compute",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "activations": "activations kept for the backward pass",
    "loss": "loss over the vocabulary",
    "workspace": "temporaries of attention, unpacking, the rest",
    "pixels": "pixels of pictures",
}


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML or JSON file, native or LLaMA-Factory's.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As micro_batch_tokens=1024.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Time a few layers with random weights, for the speed.")
    ] = False,
    brief: Annotated[
        bool, typer.Option("--brief", help="Only what this run needs, not what else would fit; several times faster.")
    ] = False,
    device_memory: Annotated[
        float | None,
        typer.Option(metavar="GB", help="Of each GPU, for a run on others than this machine's; dtype auto: bfloat16."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Reads the data and the model's config.json. The memory is that of the heaviest optimizer step.

    What the settings leave open (model.activation_checkpointing and micro_batch_tokens: auto) is chosen as `lowrank
    train` would.
    """
    from lowrank.compat import load_any
    from lowrank.models.loading.tokenizer import load_tokenizer
    from lowrank.pipelines.artifacts import with_adapters_found
    from lowrank.pipelines.assign_jobs import uses_job_parallelism
    from lowrank.pipelines.job_data import prepare_all
    from lowrank.pipelines.memory_plan import planner_of
    from lowrank.planning.choose import choose

    settings, warnings = load_any(config, overrides or [])
    warn(warnings)
    settings = with_adapters_found(settings)
    devices = settings.devices if isinstance(settings.devices, int) else 1
    devices = 1 if devices == 1 or uses_job_parallelism(settings, devices) else devices
    if settings.lanes == "auto" and devices > 1:
        settings = settings.model_copy(update={"lanes": devices})
    machine = None
    if device_memory is not None:
        settings, machine = _on_other_gpus(settings, device_memory)
    data = prepare_all(settings.jobs, settings.model, load_tokenizer(settings.model), lambda event: None, strict=False)
    planner = planner_of(settings, data, machine)
    chosen = choose(planner, settings.micro_batch_tokens, settings.model.activation_checkpointing)
    found: dict[str, Any] = {"plan": chosen.as_dict(), "speed": None}
    if devices > 1:
        found["devices"] = _of_devices(planner, chosen, devices)
    if not brief:
        found |= _what_fits(planner, chosen, settings)
    if calibrate:
        found["speed"] = _speed(planner, chosen, settings, data)
    if json:
        print(json_format.dumps(found, ensure_ascii=False))
    else:
        _show(chosen, found)


def _on_other_gpus(settings: RunConfig, gigabytes: float) -> tuple[RunConfig, Machine]:
    """The settings as they would be there, and a machine with so much memory on each device."""
    from lowrank.planning.machine import of_gpus

    if settings.model.dtype == "auto":
        settings = settings.model_copy(update={"model": settings.model.model_copy(update={"dtype": "bfloat16"})})
    return settings, of_gpus(int(gigabytes * 1e9))


def _of_devices(planner: Planner, chosen: MemoryPlan, number: int) -> dict[str, Any]:
    """What the plan of one device means for several, as the settings keep the base; and each other way to keep it, with
    the same forward passes: gradients are summed once a step, by chunks that travel twice, a base that is in parts is
    gathered in every pass."""
    from dataclasses import replace

    from lowrank.planning.placed import REPLICATED, SHARDED, STREAMED

    placed, parts = planner.memory.placed, planner.memory.parts
    gradients = planner.memory.gradients(chosen.micro_batch_tokens, chosen.activation_checkpointing)
    policy = chosen.activation_checkpointing
    policy = "full" if policy == "sqrt" else policy  # not with layers that are moved
    ways = []
    for base in (REPLICATED, SHARDED, STREAMED):
        way = replace(placed, base=base)
        plan = planner.of(planner.memory.model, planner.memory.placed_as(way)).plan(chosen.micro_batch_tokens, policy)
        ways.append(
            {
                "base": base,
                "bytes_per_device": plan.peak,
                "bytes_on_host": way.on_host(parts),
                "fits": plan.fits,
                "bytes_of_base_per_step": way.sent_for_base(parts, chosen.forward_passes),
            }
        )
    return {
        "number": number,
        "base": placed.base,
        "shard_size": placed.shard_size,
        "bytes_per_device": chosen.peak,
        "bytes_sent_per_step": placed.sent_for_gradients(gradients),
        "ways": ways,
    }


def _what_fits(planner: Planner, chosen: MemoryPlan, config: RunConfig) -> dict[str, Any]:
    """The limits of this machine for this run, and, where it does not fit, the changes that would help."""
    from lowrank.pipelines.memory_plan import open_settings
    from lowrank.planning.capacity import largest_tokens, longest_document
    from lowrank.planning.changes import changes_that_fit

    return {
        "largest_micro_batch_tokens": largest_tokens(planner, chosen),
        "longest_document_tokens": longest_document(planner, chosen),
        "changes_that_fit": [] if chosen.fits else changes_that_fit(planner, chosen, open_settings(config)),
    }


def _speed(planner: Planner, chosen: MemoryPlan, config: RunConfig, data: list[Prepared]) -> dict[str, Any]:
    from lowrank.pipelines.memory_plan import tokens_to_train
    from lowrank.planning.speed import calibrate

    speed = calibrate(planner.memory, chosen)
    tokens = tokens_to_train(config.jobs, data)
    faster = None
    if speed.step is not None:
        steps = [own.train.tokens_of_steps() for own in data]
        faster = round(speed.step.times_faster([sum(own) / len(own) for own in steps], chosen.micro_batch_tokens), 2)
    return {
        "times_faster_than_one_after_another": faster,
        "tokens_per_second": round(speed.tokens_per_second, 1),
        "tokens_to_train": tokens,
        "seconds_to_train": round(tokens / speed.tokens_per_second, 1),
    }


def _together(faster: float) -> str:
    """What training the jobs in the same passes saves."""
    if faster < 1.05:
        return "as fast as one job after another: their steps are large enough alone; the base is in memory once"
    return f"{faster:g} times faster than one job after another"


def _show(chosen: MemoryPlan, found: dict[str, Any]) -> None:
    from rich.table import Table

    from lowrank.planning.plan import describe_activation_checkpointing, describe_planned_media
    from lowrank.report.formatting import gigabytes, rough_duration
    from lowrank.terminal import Console

    console = Console(highlight=False)
    table = Table("memory", "", title=f"the heaviest step, on {chosen.device}", title_justify="left")
    table.columns[1].justify = "right"
    for name, label in _PARTS.items():
        if name != "pixels" or chosen.pictures is not None:
            table.add_row(label, gigabytes(getattr(chosen.step, name)))
    if chosen.process:
        table.add_row("Python, libraries, data, the allocator", gigabytes(chosen.process))
    table.add_row("while loading", gigabytes(chosen.loading), style="dim")
    mark = "green" if chosen.fits else "red"
    table.add_row("peak", f"[{mark}]{gigabytes(chosen.peak)}[/]", style="bold")
    table.add_row("free, with what this process holds", gigabytes(chosen.available))
    console.print(table)
    passes = f"{chosen.forward_passes} forward pass{'es' if chosen.forward_passes > 1 else ''} a step"
    console.print(
        f"Runs with    micro_batch_tokens: {chosen.micro_batch_tokens} ({passes}), model.activation_checkpointing: "
        f"{chosen.activation_checkpointing} ({describe_activation_checkpointing(chosen.activation_checkpointing)})"
    )
    if chosen.pictures is not None:
        console.print(f"Pictures     {describe_planned_media(chosen.pictures)}")
    if "longest_document_tokens" in found:
        console.print(
            f"Would fit    forward passes of {found['largest_micro_batch_tokens']:,} tokens; documents of "
            f"{found['longest_document_tokens']:,} tokens"
        )
    devices = found.get("devices")
    if devices:
        console.print(
            f"Devices      {devices['number']}, each with what the table says; "
            f"{gigabytes(devices['bytes_sent_per_step'])} of gradients leave each of them a step"
        )
        for way in devices["ways"]:
            moved, host = way["bytes_of_base_per_step"], way["bytes_on_host"]
            console.print(
                f"             base: {way['base']:<11} {gigabytes(way['bytes_per_device'])} a device, "
                + ("[green]fits[/]" if way["fits"] else "[red]does not fit[/]")
                + (f"; {gigabytes(moved)} of the base reach each of them a step" if moved else "")
                + (f", {gigabytes(host)} of host memory a machine" if host else "")
            )
    speed = found["speed"]
    if speed:
        console.print(
            f"Speed        about {speed['tokens_per_second']:,.0f} tokens a second, "
            f"{rough_duration(speed['seconds_to_train'])} for {speed['tokens_to_train']:,} tokens"
        )
        if speed["times_faster_than_one_after_another"] is not None:
            console.print(f"Together     {_together(speed['times_faster_than_one_after_another'])}")
    else:
        console.print("Speed        not measured; --calibrate times a few layers")
    if not chosen.fits:
        console.print("[red]It does not fit.[/]")
        for change in found.get("changes_that_fit", ()):
            console.print(f"  - {change}")
