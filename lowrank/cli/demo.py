"""`lowrank demo`: the main job on the base and the data that ship with lowrank."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowrank.evaluate.exact_match import Answered

_SHOWN = 4


def demo(
    output_dir: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the demo's configuration.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print events and the result as JSON.")] = False,
) -> None:
    """Three adapters learn, in one pass over one base, to turn messages in English and Chinese into JSON."""
    from lowrank.config import load
    from lowrank.pipelines.train import train
    from lowrank.report import formatting
    from lowrank.report.reporters import view_for
    from lowrank.terminal import Console

    console = Console(quiet=json, highlight=False)
    path = Path(__file__).parent.parent / "data" / "demo" / "demo.yaml"
    config = load(path, [f"output_dir={output_dir}", "overwrite=true", *(overrides or [])])
    console.print(f"[bold]lowrank demo[/]: {len(config.jobs)} adapters at once on {config.model.path}\n")
    train(config, reporters=[view_for(json=json)])

    console.print("\nAsking the untouched base and every adapter the held-out questions ...")
    answered = _answer_held_out(output_dir)
    scores = {model_name: _score(answered, model_name) for model_name in answered[0].answers}
    best = max((model_name for model_name in scores if model_name != "base"), key=lambda model_name: scores[model_name])
    result = {"exact_match": scores, "best": best, "adapter": str(output_dir / best / "best")}
    (output_dir / "demo.json").write_text(json_format.dumps(result, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if json:
        print(json_format.dumps(result, ensure_ascii=False))
        return
    _show(console, answered, scores, best)
    console.print(f"\nThe best adapter is [bold]{best}[/], in {output_dir / best / 'best'}")
    console.print(f"The curves are in {output_dir / 'loss.png'}\n")
    program = formatting.program()
    for what, command in (
        ("talk to it", f"[bold]{program} chat {output_dir} --adapter {best}[/]"),
        ("export it", f"[bold]{program} export {output_dir} --adapter {best} --to merged,awq[/]"),
        (
            "for llama.cpp",
            "[bold]pip install 'lowrank-llm\\[gguf]'[/], then [bold]--to gguf --type q8_0,q4_k_m[/]",
        ),
        ("look at your data", f"[bold]{program} data your.json[/]"),
        ("train on it", f"[bold]{program} train model=MODEL data.train=your.json output_dir=runs/mine[/]"),
        ("in a browser", f"[bold]{program} board[/] [dim](pip install 'lowrank-llm\\[board]')[/]"),
    ):
        console.print(f"  {what:<18}  {command}", soft_wrap=True)  # to be copied whole


def _answer_held_out(run: Path) -> list[Answered]:
    """Every held-out question to every model."""
    from lowrank.cli.warn import warn
    from lowrank.data.config import SourceConfig
    from lowrank.data.formats.built_in import messages
    from lowrank.data.sources.rows import read_rows
    from lowrank.evaluate.exact_match import generate_answers
    from lowrank.generate.request import GenerationConfig
    from lowrank.pipelines.inference import open_inference_model

    trained = open_inference_model(str(run), notify=lambda text: warn([text]))
    rows = read_rows(SourceConfig(path="lowrank/demo-heldout"), seed=0, max_samples=None)
    conversations = [messages(dict(row.values), {}, {}) for row in rows]
    sampling = GenerationConfig(max_new_tokens=96)
    return generate_answers(
        conversations, list(trained.slots), lambda conversation: trained.answer(conversation, sampling)
    )


def _score(answered: Sequence[Answered], model_name: str) -> float:
    from lowrank.evaluate.exact_match import exact_match

    return exact_match(answered, model_name)


def _show(console: object, answered: Sequence[Answered], scores: dict[str, float], best: str) -> None:
    """A few answers side by side, and the scores."""
    from rich.table import Table
    from rich.text import Text

    from lowrank.terminal import Console

    assert isinstance(console, Console)
    table = Table(expand=True, show_lines=True)
    for title in ("question", "before", f"after ({best})"):
        table.add_column(title, overflow="fold")  # Chinese has no spaces to break lines at
    for each in answered[:: max(1, len(answered) // _SHOWN)][:_SHOWN]:
        right = each.answers[best].strip() == each.expected.strip()
        table.add_row(
            Text(each.question), Text(each.answers["base"].strip()), Text(each.answers[best].strip(), "green" * right)
        )
    console.print(table)
    marks = Table("exact match on held-out questions", "before", "after")
    for model_name, score in scores.items():
        if model_name != "base":
            marks.add_row(
                model_name, f"{scores['base']:.1%}", Text(f"{score:.1%}", "bold green" if model_name == best else "")
            )
    console.print(marks)
