"""`lowrank eval`: lm-eval's tasks on all adapters of a run, and the bare base."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank.cli.sampling import Compile
from lowrank.cli.shared_options import Base, Last, ModelPath, OnlyAdapters, ResultFolder, RunChatTemplate
from lowrank.cli.warn import warn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def eval(
    model: ModelPath,
    tasks: Annotated[str, typer.Option(help="Names of lm-eval's tasks or groups: mmlu,ceval,cmmlu,gsm8k.")],
    adapter: OnlyAdapters = None,
    include_path: Annotated[
        Path | None, typer.Option(help="A folder with task files (YAML) of your own; their data may be local files.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of each task; for trying out.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask through the chat template of the run.")
    ] = False,
    chat_template: RunChatTemplate = None,
    base: Base = None,
    last: Last = False,
    compile: Compile = False,
    output: ResultFolder = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    r"""Writes, for each adapter, lm-eval's own results.json and samples. Needs `pip install 'lowrank-llm\[eval]'`.

    Tasks whose data is on the Hugging Face hub need it or a filled cache; task files with local data need nothing.
    """
    from lowrank.errors import ConfigError, LowrankError
    from lowrank.pipelines.inference import open_inference_model
    from lowrank.pipelines.resolve import is_run
    from lowrank.terminal import Console

    try:
        from lowrank.evaluate.harness import BankLM, HarnessAnswers
        from lowrank.evaluate.harness_tasks import find_tasks, names_of, run_tasks, write_results
    except ImportError as error:
        raise ConfigError(f"lowrank eval needs {error.name}: pip install 'lowrank-llm[eval]'") from error
    wanted = names_of(tasks)
    manager = find_tasks(wanted, include_path)
    which = "last" if last else "best"
    trained = open_inference_model(
        model, which=which, chat_template=chat_template, base=base, compile=compile, notify=lambda text: warn([text])
    )
    chosen = [name for each in adapter or () for name in each.split(",") if name] or list(trained.slots)
    answers = HarnessAnswers(trained.answering(chosen, ()))
    folder = output or (Path(model) / "eval" if is_run(Path(model)) else Path("eval"))
    console = Console(stderr=True, highlight=False)
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    with console.status("") as status:
        answers.on_done = lambda what, done, total: status.update(f"{what}: {done} of {total}, {len(chosen)} models")
        for name in chosen:
            lm = BankLM(answers, name)
            try:
                found = run_tasks(lm, wanted, manager, num_fewshot, limit, apply_chat_template)
            except LowrankError as error:
                if name not in answers.broken:
                    raise
                failed[name] = str(error)
                continue
            write_results(found, folder / name)
            results[name] = found["results"]
    warn(failed.values())
    if answers.shortened:
        cut = len(answers.shortened)
        warn([f"{cut} contexts were longer than the model reads and were cut on the left, as lm-eval does"])
    if json:
        content = {"results": results, "failed": failed, "shortened": len(answers.shortened), "folder": str(folder)}
        print(json_format.dumps(content, ensure_ascii=False, default=str))
        return
    _show(Console(highlight=False), results)
    console.print(f"lm-eval's results and samples of each adapter are in {folder}")


def _show(console: Any, results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """A line per task and metric, a column per model."""
    from rich.table import Table
    from rich.text import Text

    table = Table("task", "metric")
    for name in results:
        table.add_column(Text(name))
    for task, metric in _rows(list(results.values())):
        cells = []
        for own in results.values():
            value, error = own.get(task, {}).get(metric), own.get(task, {}).get(_error_of(metric))
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            cells.append(Text(f"{shown} ±{error:.4f}" if isinstance(error, float) else shown))
        table.add_row(Text(task), metric.partition(",")[0], *cells)
    console.print(table)
    console.print("± standard error, as lm-eval estimates it")


def _rows(results: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, str]]:
    found = {
        (task, metric): None
        for own in results
        for task, values in own.items()
        for metric, value in values.items()
        if "," in metric and "_stderr" not in metric and isinstance(value, (int, float))
    }
    return list(found)


def _error_of(metric: str) -> str:
    name, _, rest = metric.partition(",")
    return f"{name}_stderr,{rest}"
