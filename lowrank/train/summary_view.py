"""The end of a run on the screen: a table of the jobs, the best one, and what to do next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lowrank.train import wording

KINDS = {"falling": "cyan", "flat": "green", "overfitting": "yellow", "diverged": "red", "too_short": "dim"}
ENDS = {
    "done": "done",
    "early_stopping": "stopped early",
    "not_finite": "not finite",
    "interrupted": "interrupted",
    None: "not over",
}


def render_summary(summary: dict[str, Any]) -> RenderableType:
    """A summary.json for people; fits any width."""
    parts: list[RenderableType] = [_table(summary), Text(), *_verdicts(summary), Text(), _totals(summary), Text()]
    parts += _best(summary)
    parts += _next(summary)
    return Padding(Group(*parts), (0, 0, 1, 1))


def _table(summary: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("job", style="bold", overflow="fold")
    for title in ("steps", "loss", "held-out, best", "tok/s"):
        table.add_column(title, justify="right")
    table.add_column("")
    for name, job in summary["jobs"].items():
        best = job["best_eval"]
        held_out = f"{wording.loss(best['loss'])} at step {best['step']}" if best else "-"
        steps = f"{job['steps']}/{job['num_steps']}"
        losses = f"{wording.loss(job['first_loss'])} → {wording.loss(job['last_loss'])}"
        rate = wording.rate(job["tokens_per_second"]).removesuffix(" tok/s")
        end = Text(ENDS.get(job["finished"], str(job["finished"])))
        end.stylize({"not_finite": "red", "interrupted": "yellow"}.get(job["finished"], "green"))
        if job["skipped_steps"]:
            end.append(f", {job['skipped_steps']} skipped", style="yellow")
        star = " ★" if name == summary["best_job"] and len(summary["jobs"]) > 1 else ""
        table.add_row(Text(name + star), steps, losses, held_out, rate, end)
    return table


def _verdicts(summary: dict[str, Any]) -> list[Text]:
    lines = []
    for name, job in summary["jobs"].items():
        kind, sentence = job["verdict"]["kind"], job["verdict"]["sentence"]
        line = Text("" if len(summary["jobs"]) == 1 else f"{name}: ", style="bold")
        head, colon, rest = sentence.partition(":")
        line.append(head + colon, style=f"not bold {KINDS.get(kind, '')}")
        line.append(rest, style="not bold")
        lines.append(line)
    return lines


def _totals(summary: dict[str, Any]) -> Text:
    parts = [
        f"{wording.count(summary['train_tokens'])} tokens in {wording.duration(summary['train_seconds'])}",
        wording.rate(summary["tokens_per_second"]),
        f"peak memory {wording.memory(summary['peak_memory_bytes'])}",
    ]
    if summary["peak_device_memory_bytes"] is not None:
        parts.append(f"GPU {wording.memory(summary['peak_device_memory_bytes'])}")
    return Text(" · ".join(parts), style="dim")


def _best(summary: dict[str, Any]) -> list[Text]:
    folder, name = Path(summary["output_dir"]), summary["best_job"]
    if name is None:
        where = Text.assemble("Adapters  ", (str(folder / "<job>" / "best"), "bold"))
        return [where]
    job = summary["jobs"][name]
    which = "best" if job["best_eval"] else "last"
    text = Text.assemble("Adapter   " if len(summary["jobs"]) == 1 else f"Best job  {name}, ")
    text.append(str(folder / job["paths"][which]), style="bold")
    if job["best_eval"]:
        text.append(f" (held-out {wording.loss(job['best_eval']['loss'])} at step {job['best_eval']['step']})")
    return [text, Text.assemble("Curves    ", str(folder / summary["paths"]["plot"]))]


def _next(summary: dict[str, Any]) -> list[Text]:
    if summary["interrupted"]:
        return [Text.assemble("Go on     ", ("run the same command with resume=true", "bold"))]
    command = f"lowrank chat {shlex.quote(summary['output_dir'])}"
    if len(summary["jobs"]) > 1 and summary["best_job"]:
        command += f" --adapter {shlex.quote(summary['best_job'])}"
    return [Text.assemble("Talk      ", (command, "bold"))]
