"""`lowrank predict`: all adapters of a run, and the bare base, on the questions of a file."""

from __future__ import annotations

import hashlib
import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank.cli.warn import warn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lowrank.evaluate.predict import Verdict


def predict(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, an adapter folder, or a model.")],
    data: Annotated[str, typer.Option("--data", help="Questions with their answers: any file `train` reads.")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="Only these (r8,r64 or given twice); else all and the base.")
    ] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Use this many rows, chosen by the seed.")] = None,
    format: Annotated[str | None, typer.Option("--format", help="alpaca, sharegpt, ...; left out: recognised.")] = None,
    metrics: Annotated[str, typer.Option(help="exact_match,bleu4,rouge1,rouge2,rougeL; or none.")] = "",
    llamafactory: Annotated[
        bool, typer.Option("--llamafactory", help="Also LLaMA-Factory's numbers, to compare with old reports.")
    ] = False,
    perplexity: Annotated[bool, typer.Option(help="Also the perplexity of the answers in the data.")] = True,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer at the most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the rows that are chosen, and of draws.")] = 42,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers in the making at once.")] = 64,
    chat_template: Annotated[str | None, typer.Option(help="Instead of the run's own.")] = None,
    last: Annotated[bool, typer.Option("--last", help="The last adapters of a run instead of the best.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for the results; left out: in the run folder.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Writes predictions.jsonl (question, label, the answer of each adapter) and metrics.json.

    Interrupted, the same command goes on where it stopped. Intervals are 95 % bootstrap intervals over the rows.
    """
    from rich.console import Console

    from lowrank.checkpoints.atomic import write_text
    from lowrank.data.config import SourceConfig
    from lowrank.evaluate.metrics import LLAMAFACTORY_NAMES, NAMES, check_installed
    from lowrank.evaluate.predict import (
        Voices,
        answer_questions,
        compare,
        score_labels,
        unanswered,
        write_predictions,
    )
    from lowrank.evaluate.questions import read_questions
    from lowrank.generate.request import Config
    from lowrank.trained import BARE, open_trained

    console = Console(stderr=json, highlight=False)
    wanted = () if metrics == "none" else tuple(name for name in metrics.split(",") if name) or NAMES
    names = (*wanted, *(LLAMAFACTORY_NAMES if llamafactory else ()))
    check_installed(names)
    source = SourceConfig(path=data, format=format, max_samples=max_samples)
    questions = read_questions(source, seed=seed, notify=lambda text: warn([text]))
    trained = open_trained(
        model, which="last" if last else "best", chat_template=chat_template, notify=lambda text: warn([text])
    )
    chosen = [name for each in adapter or () for name in each.split(",") if name] or list(trained.slots)
    slots = {name: trained.slot(name) for name in chosen}
    voices = Voices(trained.base, trained.bank, slots, {name: trained.renderer_of(name) for name in chosen})
    folder = output or _folder_for(model, data)
    folder.mkdir(parents=True, exist_ok=True)
    config = Config(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    settings = {"model": model, "data": data, "last": last, "sampling": config.model_dump(mode="json")}
    settings |= {"chat_template": chat_template, "voices": trained.versions(chosen)}
    partial = folder / f"unfinished-{_digest(settings)}.jsonl"

    with _progress(console) as bar:
        told = _teller(bar, f"{len(questions)} questions, {len(chosen)} voices")
        answers = answer_questions(voices, questions, config, partial, max_rows=batch_size, on_done=told)
        likelihood, unscored = {}, []
        if perplexity:
            told = _teller(bar, "perplexity of the labels")
            likelihood, unscored = score_labels(voices, questions, on_done=told)
    missing = unanswered(answers)
    labels = [question.label.content for question in questions]
    verdicts = compare(answers, labels, names, likelihood, BARE if BARE in chosen else None)
    warn([each.said(len(questions)) for each in missing])
    warn(_left_out(verdicts, len(questions), unscored, list(likelihood)))

    write_predictions(folder / "predictions.jsonl", questions, answers)
    result = {
        **settings,
        "rows": len(questions),
        "unanswered": {name: len(each.places) for each in missing for name in each.voices},
        "metrics": _plain(verdicts),
        "predictions": str(folder / "predictions.jsonl"),
    }
    write_text(folder / "metrics.json", json_format.dumps(result, indent=2, ensure_ascii=False) + "\n")
    partial.unlink()
    if json:
        print(json_format.dumps(result, ensure_ascii=False))
    else:
        _show(console, verdicts, len(questions))
        console.print(f"\nEvery answer is in {folder / 'predictions.jsonl'}, the numbers in {folder / 'metrics.json'}")


def _left_out(
    verdicts: Mapping[str, Mapping[str, Verdict]], rows: int, unscored: Sequence[str], voices: Sequence[str]
) -> list[str]:
    """What perplexity is not of: questions that could not be scored, and numbers that are none."""
    told = []
    if unscored:
        reasons = "; ".join(list(dict.fromkeys(unscored))[:3])
        told.append(f"perplexity leaves out {len(unscored)} of {rows} questions ({reasons})")
    for voice in voices:
        own = verdicts[voice].get("perplexity")
        strange = rows - len(unscored) - (own.rows if own else 0)
        if strange > 0:
            told.append(f"{voice}: perplexity leaves out {strange} questions whose log-probabilities are not finite")
    return told


def _folder_for(model: str, data: str) -> Path:
    name = Path(data).stem or "data"
    return Path(model) / "predict" / name if (Path(model) / "config.json").is_file() else Path("predict") / name


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.blake2b(json_format.dumps(settings, sort_keys=True).encode(), digest_size=6).hexdigest()


def _progress(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


def _teller(bar: Any, text: str) -> Any:
    task = bar.add_task(text, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


def _plain(verdicts: Mapping[str, Mapping[str, Verdict]]) -> dict[str, dict[str, Any]]:
    return {
        voice: {
            name: {
                "value": verdict.value.value,
                "rows": verdict.rows,
                "interval": [verdict.value.low, verdict.value.high],
                **({"gain": vars(verdict.gain)} if verdict.gain else {}),
                **({"signature": verdict.signature} if verdict.signature else {}),
            }
            for name, verdict in own.items()
        }
        for voice, own in verdicts.items()
    }


def _show(console: Any, verdicts: Mapping[str, Mapping[str, Verdict]], rows: int) -> None:
    """A line per voice; bold where it differs from the base for sure."""
    from rich.table import Table
    from rich.text import Text

    names = list(dict.fromkeys(name for own in verdicts.values() for name in own))
    table = Table(f"{rows} rows", *(name.replace("_", " ") for name in names))
    for voice, own in verdicts.items():
        cells = []
        for name in names:
            if name not in own:
                cells.append(Text("-"))
                continue
            value, gain = own[name].value, own[name].gain
            half = (value.high - value.low) / 2
            sure = gain is not None and (gain.low > 0 or gain.high < 0)
            shown = f"{value.value:.3g}" if name == "perplexity" and value.value >= 1000 else f"{value.value:.1f}"
            cells.append(Text(f"{shown} ±{half:.1f}", "bold" if sure else ""))
        table.add_row(Text(voice), *cells)
    console.print(table)
    console.print("± half of the 95 % bootstrap interval; bold: differs from the base in 95 % of paired resamples")
