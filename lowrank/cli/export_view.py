"""What a person sees of an export: how far it is, and how close to what was trained it came."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich import box
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from lowrank.export.writing.sizes import format_size
from lowrank.terminal import Console


class ExportProgressBar:
    """A progress bar for what is being done, with the time left; nothing where the console is no terminal."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """See `ExportProgressCallback` (pipelines/export.py)."""
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total)
        self.progress.update(self.tasks[what], completed=done, total=total, visible=done < total)

    def __enter__(self) -> ExportProgressBar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()


def show(console: Console, result: dict[str, Any]) -> None:
    """Where everything is, the table of comparisons, and what does not fit."""
    written = {name: target for name, target in result["targets"].items() if "error" not in target}
    compared = [(name, each) for name, target_result in written.items() for each in target_result["comparisons"]]
    rounded = any(each["against"] for _, each in compared)
    between = ["KL from\n16 bits"] if rounded else []
    gained = any(each["gain_kept"] is not None for _, each in compared)
    gain = ["gain\nkept"] if gained else []
    numbers = ["mean\nKL", *between, "same\ntoken", "perplexity", *gain, "same\nanswers", ""]
    table = Table(Column("", overflow="fold", min_width=6), *(Column(each, no_wrap=True) for each in numbers),
                  box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fmt: skip
    twice = Counter(each["name"] for _, each in compared)  # gguf and ollama may write a file of one name each
    for name, each in compared:
        table.add_row(*_row(name, each, rounded=rounded, gained=gained, with_target=twice[each["name"]] > 1))
    if table.row_count:
        first = compared[0][1]
        on = written[compared[0][0]]["compared_on"]
        console.print(f"\nCompared with what was trained, on {on} ({first['tokens']} tokens of answers):")
        console.print(table)
        console.print(f"  trained: perplexity {first['reference_perplexity']:.4g}{_base(first)}", style="dim")
    for name, target_result in written.items():
        console.print(
            Text.assemble((name, "bold"), f"  {target_result['path']}  {format_size(target_result['bytes'])}"),
            soft_wrap=True,
        )
        for line in target_result["written"]:
            console.print(Text(f"  {line}", "dim"), soft_wrap=True)
        for each in target_result["comparisons"]:
            for problem in each["problems"]:
                console.print(Text(f"  {each['name']}: {problem}", "red"), soft_wrap=True)
    for name in (name for name in result["targets"] if name not in written):
        console.print(Text.assemble((name, "bold"), ("  failed", "bold red")))


def _row(target: str, each: dict[str, Any], *, rounded: bool, gained: bool, with_target: bool) -> list[Text]:
    name, comma, about = each["name"].partition(", ")  # ", asked about a picture"
    name = f"{name if '.' in name else target}{comma}{about}"
    name = f"{target}: {name}" if with_target and name != target else name
    verdict = Text("same", "green") if each["passed"] else Text("differs", "bold red")
    between = [Text(f"{each['against_mean_kl']:.2g}" if each["against"] else "")] if rounded else []
    gain = [Text("" if each["gain_kept"] is None else f"{each['gain_kept']:.1%}")] if gained else []
    return [
        Text(name), Text(f"{each['mean_kl']:.2g}"), *between, Text(f"{each['top1_agreement']:.1%}"),
        Text(f"{each['perplexity']:.4g}"), *gain, Text(f"{each['greedy_same']} of {each['greedy_prompts']}"), verdict,
    ]  # fmt: skip


def _base(each: dict[str, Any]) -> str:
    return "" if each["base_perplexity"] is None else f", untouched base: {each['base_perplexity']:.4g}"
