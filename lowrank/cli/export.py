"""`lowrank export`: a run, an adapter or a model in the forms that other programs run."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from lowrank.take_home import Order
    from lowrank.to_take_home import Found


def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, an adapter folder (PEFT's too), or a model.")
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings of a target, as merged.max_shard_size=2GB."),
    ] = None,
    to: Annotated[str, typer.Option("--to", help="What to write; several with commas: peft,merged.")] = "merged",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to; of several each to a folder in it. [RUN-export/NAME-TARGET]"),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="A job of the run (left out: the best) or more adapter folders; a,b: combined."),
    ] = None,
    combine: Annotated[
        str | None, typer.Option(help="How several adapters become one: add, average, linear, ties, dare, dare_ties.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="A weight for each adapter: 0.7,0.3.")] = None,
    density: Annotated[float, typer.Option(help="ties, dare: the share of entries that is kept.")] = 0.5,
    types: Annotated[str | None, typer.Option("--type", help="For gguf: q8_0,q4_k_m.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: bfloat16, float16, float32.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="A built-in template or a .jinja file, instead of the one training used.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="A data file to compare on, instead of the run's held-out rows.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Read back what was written, compare.")] = True,
    push: Annotated[
        str | None, typer.Option(help="Upload it to this hub repository, owner/name; the token is HF_TOKEN's.")
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="The last adapters of a run instead of the best.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, say what would be done, write nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Every target is checked before anything is written, and read back and compared with base + adapter afterwards.

    The comparison is printed and saved as export.json beside what was written. A target that differs by more than it
    may is kept, and the exit code is 6.
    """
    from rich.console import Console

    from lowrank.cli.export_settings import read_combination, read_targets
    from lowrank.cli.export_view import Watcher, show
    from lowrank.cli.warn import warn
    from lowrank.errors import NotTheSameError
    from lowrank.export.hub import check_push, push_folder
    from lowrank.take_home import order, take_home
    from lowrank.to_take_home import open_source

    console = Console(highlight=False, quiet=json)
    targets = read_targets(to, options or [], {"types": types, "dtype": dtype})
    repositories = check_push(push, [target.type for target in targets], dry_run=dry_run)
    found = open_source(
        run,
        adapters=[name for names in adapter or () for name in names.split(",") if name],
        which="last" if last else "best",
        combination=read_combination(combine, weights, density),
        chat_template=chat_template,
        notify=lambda text: warn([text]) if json else console.print(text, soft_wrap=True),
    )
    orders = order(targets, output or _default_place(found, [target.type for target in targets]))
    with Watcher(console) as watch:
        result = take_home(
            found, orders, verify=verify, prompts=prompts, dry_run=dry_run, watch=watch,
            notify=lambda text: console.print(text, soft_wrap=True),
        )  # fmt: skip
    if push:
        result["pushed"] = [
            push_folder(each.folder, repositories[each.type], dry_run=dry_run) for each in orders if result["passed"]
        ]
    if json:
        print(json_format.dumps(result, ensure_ascii=False))
    elif not dry_run:
        show(console, result)
    _say_pushed(console, result)
    if not result["passed"]:
        if json:
            raise typer.Exit(NotTheSameError.exit_code)
        raise NotTheSameError(_different(orders, result))


def _default_place(found: Found, targets: list[str]) -> Path:
    """Beside the run, never in it."""
    folder = found.folder if found.folder.is_dir() else Path(found.source.name.replace("/", "-"))
    beside = Path(f"{folder.resolve() if folder.exists() else folder}-export")
    place = beside / found.source.name.replace("/", "-")
    return place.with_name(f"{place.name}-{targets[0]}") if len(targets) == 1 else place


def _say_pushed(console: Console, result: dict[str, Any]) -> None:
    for each in result.get("pushed", ()):
        done = "would be uploaded to" if each["dry_run"] else "uploaded to"
        console.print(f"{each['files']} files {done} {each['url']}", soft_wrap=True)


def _different(orders: list[Order], result: dict[str, Any]) -> str:
    names = [each.type for each in orders if not result["targets"][each.type]["passed"]]
    return (
        f"{', '.join(names)}: what was written differs from what was trained by more than it may (see above); "
        "it is kept, with the numbers in export.json"
    )
