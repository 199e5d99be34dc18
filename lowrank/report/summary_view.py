"""The end of a run on the screen: a table of the jobs, the best one, and what to do next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lowrank.report import formatting

KINDS = {"falling": "cyan", "flat": "green", "overfitting": "yellow", "diverged": "red", "too_short": "dim"}
MANY = 6
"""With more jobs than these, a verdict is a few words in the table; the sentence is in summary.json."""
ENDS = {
    "done": "done",
    "early_stopping": "stopped early",
    "not_finite": "not finite",
    "interrupted": "interrupted",
    "stopped": "stopped",
    "pruned": "pruned",
    "failed": "could not begin",
}


def render_summary(summary: dict[str, Any]) -> RenderableType:
    """A summary.json for people; fits any width."""
    many = len(summary["jobs"]) > MANY
    parts: list[RenderableType] = [_table(summary, many), Text()]
    if not many:
        parts += [*_verdicts(summary), Text()]
    parts += [_totals(summary), Text(), *_best(summary), *_notes(summary), *_next(summary)]
    return Padding(Group(*parts), (0, 0, 1, 1), expand=False)


def _table(summary: dict[str, Any], many: bool) -> Table:
    """Of many jobs a line each, narrow enough for 80 columns; of few, more of each."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    widest = max((cell_len(name) for name in summary["jobs"]), default=0) + 2
    table.add_column("job", style="bold", overflow="fold", min_width=min(widest, 14))  # else the others squeeze it
    for title in ("steps", "loss", "best held-out", *(() if many else ("tok/s",))):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("", *(("curve",) if many else ())):
        table.add_column(title)
    for name, job in summary["jobs"].items():
        best = job["best_eval"]
        star = " ★" if name == summary["best_job"] and len(summary["jobs"]) > 1 else ""
        losses = formatting.loss(job["last_loss"])
        cells: list[RenderableType] = [
            Text(name + star),
            f"{job['steps']}/{job['num_steps']}",
            losses if many else f"{formatting.loss(job['first_loss'])} → {losses}",
            f"{formatting.best(best)} at {'' if many else 'step '}{best['step']}" if best else "-",
        ]
        if many:
            cells += [_end(job), _in_short(job["verdict"])]
        else:
            cells += [formatting.rate(job["tokens_per_second"]).removesuffix(" tok/s"), _end(job)]
        table.add_row(*cells)
    return table


def _end(job: dict[str, Any]) -> Text:
    style = {"not_finite": "red", "interrupted": "yellow"}.get(job["finished"], "green")
    finished = str(job["finished"] or "not over")
    text = Text(ENDS.get(finished, finished), style=style)
    if job["skipped_steps"]:
        text.append(f", {job['skipped_steps']} skipped", style="yellow")
    return text


def _in_short(verdict: dict[str, Any]) -> Text:
    phrases = {"flat": "flat since", "overfitting": "overfitting since", "diverged": "diverged since"}
    kind: str = verdict["kind"]
    text = phrases.get(kind, kind.replace("_", " "))
    return Text(f"{text} {verdict['step']}" if verdict["step"] else text, style=KINDS.get(kind, ""))


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
        f"{formatting.count(summary['train_tokens'])} tokens in {formatting.duration(summary['train_seconds'])}",
        formatting.rate(summary["tokens_per_second"]),
        f"peak memory {formatting.gigabytes(summary['peak_memory_bytes'])}",
    ]
    if summary["peak_device_memory_bytes"] is not None:
        parts.append(f"GPU {formatting.gigabytes(summary['peak_device_memory_bytes'])}")
    return Text(" · ".join(parts), style="dim")


def _best(summary: dict[str, Any]) -> list[Text]:
    folder, name = Path(summary["output_dir"]), summary["best_job"]
    if name is None:
        where = Text.assemble("Results   ", (str(folder / "<job>" / "best"), "bold"))
        return [where, _curves(summary)]
    job = summary["jobs"][name]
    which = "best" if job["best_eval"] else "last"
    text = Text.assemble("Result    " if len(summary["jobs"]) == 1 else f"Best job  {name}, ")
    text.append(str(folder / job["paths"].get(which, f"{name}/{which}")), style="bold")
    if job["best_eval"]:
        text.append(f" (held-out {formatting.best(job['best_eval'])} at step {job['best_eval']['step']})")
    return [text, _curves(summary)]


def _notes(summary: dict[str, Any]) -> list[Text]:
    """What a person who goes on with the best should know; summaries before 2026-12 say nothing of it."""
    alone = len(summary["jobs"]) == 1
    notes = {name: note for name, job in summary["jobs"].items() if (note := job.get("best_note"))}
    return [
        Text.assemble("Note      ", (note if alone else f"{name}: {note}", "yellow")) for name, note in notes.items()
    ]


def _curves(summary: dict[str, Any]) -> Text:
    return Text.assemble("Curves    ", str(Path(summary["output_dir"]) / summary["paths"]["plot"]))


def _next(summary: dict[str, Any]) -> list[Text]:
    if summary["interrupted"]:
        return [Text.assemble("Go on     ", ("run the same command with resume=true", "bold"))]
    reward_models = [name for name, job in summary["jobs"].items() if job.get("objective") == "reward"]
    rewards = Text.assemble(
        "Rewards   ", ("in Python: ", "dim"), f"lowrank.load({summary['output_dir']!r}).rewards(...)"
    )
    if len(reward_models) == len(summary["jobs"]):
        return [rewards]
    command = f"{formatting.program()} chat {shlex.quote(summary['output_dir'])}"
    if len(summary["jobs"]) > 1 and summary["best_job"]:
        command += f" --adapter {shlex.quote(summary['best_job'])}"
    return [Text.assemble("Talk      ", (command, "bold")), *([rewards] if reward_models else [])]
