"""`lowrank predict`: all adapters of a run, and the bare base, on the questions of a file."""

from __future__ import annotations

import json as json_format
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowrank.cli.media_dir import FetchMedia, MediaDir
from lowrank.cli.sampling import Compile, MaxNewTokens, RepetitionPenalty, Temperature, TopK, TopP
from lowrank.cli.shared_options import Base, JsonResult, Last, ModelPath, OnlyAdapters, ResultFolder, RunChatTemplate
from lowrank.cli.warn import warn
from lowrank.pipelines.resolve import is_run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lowrank.data.config import SourceConfig
    from lowrank.evaluate.predict import MetricResult
    from lowrank.pipelines.predict import Progress
    from lowrank.terminal import Console


def predict(
    model: ModelPath,
    data: Annotated[
        str,
        typer.Option(
            "--data", help="Questions with their answers: any file `train` reads; names, where --dataset-dir is given."
        ),
    ],
    adapter: OnlyAdapters = None,
    dataset_dir: Annotated[
        Path | None, typer.Option(help="Of a dataset_info.json (LLaMA-Factory's), in which --data names datasets: a,b.")
    ] = None,
    media_dir: MediaDir = None,
    fetch_media: FetchMedia = False,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Use this many rows, chosen by the seed.")] = None,
    format: Annotated[str | None, typer.Option("--format", help="alpaca, sharegpt, ...; left out: recognized.")] = None,
    metrics: Annotated[str, typer.Option(help="exact_match,bleu4,rouge1,rouge2,rougeL; or none.")] = "",
    llamafactory: Annotated[
        bool, typer.Option("--llamafactory", help="Also LLaMA-Factory's numbers and generated_predictions.jsonl.")
    ] = False,
    perplexity: Annotated[bool, typer.Option(help="Also the perplexity of the answers in the data.")] = True,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Annotated[int, typer.Option(help="Of the rows that are chosen, and of draws.")] = 42,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers in progress at once.")] = 64,
    chat_template: RunChatTemplate = None,
    base: Base = None,
    last: Last = False,
    compile: Compile = False,
    output: ResultFolder = None,
    json: JsonResult = False,
) -> None:
    """Writes predictions.jsonl (question, label, the answer of each adapter) and metrics.json.

    Interrupted, the same command goes on where it stopped. Intervals are 95 % bootstrap intervals over the rows.
    """
    from lowrank.cli.interrupts import interruption_message
    from lowrank.evaluate.metrics import NAMES
    from lowrank.generate.request import GenerationConfig
    from lowrank.pipelines.predict import PredictRequest
    from lowrank.pipelines.predict import predict as run_predict
    from lowrank.terminal import Console

    console = Console(stderr=json, highlight=False)
    wanted = () if metrics == "none" else tuple(name for name in metrics.split(",") if name) or NAMES
    sampling = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    folder = output or _folder_for(model, data)
    request = PredictRequest(
        model,
        _sources(data, dataset_dir, format, max_samples, media_dir, fetch_media),
        folder,
        adapters=tuple(name for each in adapter or () for name in each.split(",") if name),
        metrics=wanted,
        llamafactory=llamafactory,
        perplexity=perplexity,
        sampling=sampling,
        seed=seed,
        batch_size=batch_size,
        chat_template=chat_template,
        base=base,
        last=last,
        compile=compile,
    )
    with interruption_message(lambda: _left_in(folder)):
        result, metric_results = run_predict(request, progress_on(console), warn)
    if json:
        print(json_format.dumps(result, ensure_ascii=False))
    else:
        show_metric_results(console, metric_results, result["rows"])
        console.print(f"\nEvery answer is in {folder / 'predictions.jsonl'}, the numbers in {folder / 'metrics.json'}")


def _left_in(folder: Path) -> str:
    """What an interruption leaves, for people."""
    if not any(folder.glob("unfinished-*.jsonl")):
        return "interrupted; nothing was answered yet"
    return f"interrupted; the answers so far are kept in {folder}: the same command goes on from there"


def _sources(
    data: str,
    dataset_dir: Path | None,
    format: str | None,
    max_samples: int | None,
    media_dir: str | None,
    fetch_media: bool,
) -> tuple[SourceConfig, ...]:
    """A file, or names in a `dataset_info.json`."""
    from lowrank.compat.llamafactory.dataset_info import named_sources
    from lowrank.data.config import SourceConfig

    if dataset_dir is None:
        found = (SourceConfig(path=data, format=format, max_samples=max_samples, media_dir=media_dir),)
    else:
        found = named_sources([name.strip() for name in data.split(",")], dataset_dir, max_samples, media_dir)
    return tuple(each.model_copy(update={"fetch_media": fetch_media}) for each in found)


def _folder_for(model: str, data: str) -> Path:
    name = Path(data).stem or "data"
    return Path(model) / "predict" / name if is_run(Path(model)) else Path("predict") / name


def progress_on(console: Console) -> Progress:
    """Bars on a console, one for each part."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    @contextmanager
    def part(text: str) -> Generator[Callable[[int, int], None], None, None]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bars(*columns, console=console) as bars:
            task = bars.add_task(text, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)

    return part


def show_metric_results(console: Console, metric_results: Mapping[str, Mapping[str, MetricResult]], rows: int) -> None:
    """A line per model; bold where it differs from the base for sure."""
    from rich.table import Table
    from rich.text import Text

    names = list(dict.fromkeys(name for own in metric_results.values() for name in own))
    table = Table(f"{rows} rows", *(name.replace("_", " ") for name in names))
    for model_name, own in metric_results.items():
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
        table.add_row(Text(model_name), *cells)
    console.print(table)
    console.print("± half of the 95 % bootstrap interval; bold: differs from the base in 95 % of paired resamples")
