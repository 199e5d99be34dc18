"""`lowrank export`: a run, an adapter or a model in the forms that other programs run."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowrank.cli.media_dir import FetchMedia, MediaDir
from lowrank.cli.shared_options import Base, JsonResult, Last
from lowrank.errors import LowrankError, NotTheSameError
from lowrank.terminal import visible

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lowrank.data.config import SourceConfig
    from lowrank.pipelines.export_checks import ExportRequest
    from lowrank.terminal import Console


def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, an adapter folder (PEFT's too), or a model.")
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings of a target, as merged.max_shard_size=2GB."),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="What to write (peft, merged, merged_4bit, gguf, lora_gguf, ollama, gptq, awq, compressed_tensors); "
            "several with commas: peft,merged.",
        ),
    ] = "merged",
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
    media_dir: MediaDir = None,
    fetch_media: FetchMedia = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Read back what was written, compare.")] = True,
    push: Annotated[
        str | None, typer.Option(help="Upload it to this hub repository, owner/name; the token is HF_TOKEN's.")
    ] = None,
    base: Base = None,
    last: Last = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, say what would be done, write nothing.")] = False,
    json: JsonResult = False,
) -> None:
    """Every target is checked before anything is written, and read back and compared with base + adapter afterwards.

    The comparison is printed and saved as export.json beside what was written. A target that differs by more than it
    may is kept, and the exit code is 6.
    """
    from lowrank.cli.export_settings import read_combination, read_targets
    from lowrank.cli.export_view import ExportProgressBar
    from lowrank.cli.interrupts import interruption_message
    from lowrank.cli.warn import warn
    from lowrank.export.publish.hub import check_push
    from lowrank.pipelines.export import export_targets
    from lowrank.pipelines.export_checks import export_requests
    from lowrank.pipelines.export_source import open_source
    from lowrank.terminal import Console

    compared = _compared_on(prompts, media_dir, fetch_media)
    console = Console(highlight=False, quiet=json)
    targets = read_targets(to, options or [], {"types": types, "dtype": dtype})
    names = [target.type for target in targets]
    repositories = check_push(push, names, dry_run=dry_run)
    found = open_source(
        run,
        adapters=[name for names in adapter or () for name in names.split(",") if name],
        which="last" if last else "best",
        combination=read_combination(combine, weights, density),
        chat_template=chat_template,
        base=base,
        notify=lambda text: warn([text]) if json else console.print(text, soft_wrap=True),
    )
    requests = export_requests(targets, output or found.default_place(names))
    with interruption_message(lambda: _left_of(requests)), ExportProgressBar(console) as progress:
        result = export_targets(
            found, requests, verify=verify, prompts=compared, dry_run=dry_run, on_progress=progress,
            notify=lambda text: console.print(text, soft_wrap=True),
        )  # fmt: skip
    not_pushed = _push(requests, repositories, result, dry_run=dry_run) if push else {}
    _show_result(console, result, json=json, dry_run=dry_run)
    refuse_failed(requests, result, not_pushed, quietly=json)


def _left_of(requests: Sequence[ExportRequest]) -> str:
    """What an interruption leaves of an export, for people: a folder is there when all of it is."""
    from lowrank.pipelines.export import REPORT

    written = [each for each in requests if each.folder.is_dir()]
    whole = [f"{each.type} ({each.folder})" for each in written if (each.folder / REPORT).is_file()]
    uncompared = [f"{each.type} ({each.folder})" for each in written if not (each.folder / REPORT).is_file()]
    parts = [
        f"written and compared: {', '.join(whole)}" if whole else "",
        f"written, not compared: {', '.join(uncompared)}" if uncompared else "",
        "nothing was written" if not written else "the rest was not; name it alone with --to",
    ]
    return "; ".join(["interrupted", *filter(None, parts[: 3 if len(written) < len(requests) else 2])])


def _compared_on(prompts: str | None, media_dir: str | None, fetch_media: bool) -> SourceConfig | None:
    """The data file to compare on; None: the run's own rows."""
    from lowrank.data.config import SourceConfig

    if prompts:
        return SourceConfig(path=prompts, media_dir=media_dir, fetch_media=fetch_media)
    if media_dir or fetch_media:
        raise typer.BadParameter(
            "--media-dir and --fetch-media are about the rows of --prompts; a run's own have theirs"
        )
    return None


def _push(
    requests: Sequence[ExportRequest], repositories: Mapping[str, str], result: dict[str, Any], *, dry_run: bool
) -> dict[str, LowrankError]:
    """Upload what did not fail and put it into the result; why some were not taken."""
    from lowrank.export.publish.hub import push_folder

    refused: dict[str, LowrankError] = {}
    result["pushed"] = []
    for each in requests:
        if result["targets"][each.type].get("passed") is False:
            continue
        try:
            result["pushed"].append(push_folder(each.folder, repositories[each.type], dry_run=dry_run))
        except LowrankError as error:  # what was written is told all the same
            result["passed"], refused[each.type] = False, error
            result["targets"][each.type]["push_error"] = str(error)
    return refused


def _show_result(console: Console, result: dict[str, Any], *, json: bool, dry_run: bool) -> None:
    """The result: as JSON, or what was compared; and what was uploaded."""
    from lowrank.cli.export_view import show

    if json:
        print(json_format.dumps(result, ensure_ascii=False))
    elif not dry_run:
        show(console, result)
    for each in result.get("pushed", ()):
        done = "would be uploaded to" if each["dry_run"] else "uploaded to"
        console.print(f"{each['files']} files {done} {each['url']}", soft_wrap=True)


def refuse_failed(
    requests: Sequence[ExportRequest],
    result: dict[str, Any],
    not_pushed: Mapping[str, LowrankError],
    *,
    quietly: bool,
) -> None:
    """Leave by the exit code of the first target that failed or was not taken by the hub, else of those that differ
    from what was trained."""
    errors = {each.type: result["targets"][each.type].get("error") for each in requests}
    failed = {name: error for name, error in errors.items() if error}
    parts = {
        f"{name}, {part}": error
        for name in errors
        if name not in failed
        for part, error in result["targets"][name].get("failed", {}).items()
    }
    differing = [
        name
        for name in errors
        if name not in failed and any(not each["passed"] for each in result["targets"][name].get("comparisons", ()))
    ]
    failed |= parts
    codes = [error["exit_code"] for error in failed.values()] + [error.exit_code for error in not_pushed.values()]
    if not codes and not differing:
        return
    if not quietly:
        lines = [f"{name} failed: {error['message']}" for name, error in failed.items()]
        lines += [f"{name} was not uploaded: {error}" for name, error in not_pushed.items()]
        if differing:
            lines.append(
                f"{', '.join(differing)}: what was written differs from what was trained by more than it may (see "
                "above); it is kept, with the numbers in export.json"
            )
        typer.secho(visible("\n".join(lines)), fg=typer.colors.RED, err=True)
    raise typer.Exit(next(iter(codes), NotTheSameError.exit_code))
