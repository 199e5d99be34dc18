"""A new run: the form, what it will need, and the start."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from starlette.exceptions import HTTPException

from lowrank.board import form
from lowrank.board.body import BoardRequest
from lowrank.board.export_llamafactory import as_llamafactory
from lowrank.board.hub import about_hub_model
from lowrank.board.main_settings import GROUPS, PRESETS, SEARCH
from lowrank.board.models import TINY, described, models_in
from lowrank.board.page import answer_page, board_of, texts_of
from lowrank.board.places import free_name, safe_name
from lowrank.board.settings_file import as_overrides, confine, settings_of
from lowrank.board.state import Board
from lowrank.board.sweep_form import FIRST, WAYS, as_rows, num_candidates, settings_of_jobs
from lowrank.board.tasks import Task
from lowrank.board.warm_worker import Superseded, WorkerResult
from lowrank.hub_names import is_hub_name

router = APIRouter()
_LONGEST_FILE = 256 << 10


class Draft(BoardRequest):
    """What stands on the page: `values` by setting, `jobs` as rows, `extra` groups that are no fields, `sweep`
    rows of a search."""

    name: str = ""
    values: dict[str, Any] = Field(default_factory=dict)
    jobs: list[dict[str, Any]] = Field(default_factory=list)
    extra: dict[str, Any] = Field(default_factory=dict)
    sweep: list[dict[str, Any]] = Field(default_factory=list)


@router.get("/new")
def new(request: Request, source: str = "") -> Response:
    """The form; `source` is a run whose settings it begins with."""
    board, texts = board_of(request), texts_of(request)
    run = board.run(source) if source else None
    begin = _draft_of(run.config, run.name) if run and run.config else None
    known = form.fields()
    main = {name: [known[path] for path in paths if path in known] for name, paths in GROUPS.items()}
    return answer_page(
        request,
        "new.html",
        place="new",
        main=main,
        search=[known[path] for path in SEARCH],
        swept=settings_of_jobs(),
        first=FIRST,
        ways=WAYS,
        presets=PRESETS,
        begin=begin,
        source=source,
        models=models_in(board.places),
        data=_data_files(board),
        name=free_name(board.places.runs, begin["name"] if begin else "my-model"),
        help={path: texts.setting(field.help) for path, field in known.items()},
    )


@router.get("/api/fields")
def all_fields(request: Request) -> Response:
    """Every setting that the page has no place of its own for, with its help text."""
    texts = texts_of(request)
    fields = [f for path, f in form.fields().items() if path not in form.NOT_IN_FORM]
    return JSONResponse([{**field.as_dict(), "help": texts.setting(field.help)} for field in fields])


@router.post("/api/worker/warm")
def warm(request: Request) -> Response:
    """Start the warm worker: somebody has the form open."""
    board = board_of(request)
    if not board.queue.running():
        board.warm_worker.warm_up()
    return JSONResponse({})


@router.post("/api/draft/check")
def check(request: Request, draft: Draft) -> Response:
    """The settings file and the command it stands for, and every problem at its setting."""
    board = board_of(request)
    name = safe_name(draft.name, "my-model")
    try:
        settings = settings_of(board.places, name, draft.values, draft.jobs, draft.extra, draft.sweep)
    except ValueError as error:
        return JSONResponse({"problems": _problems(request, error), "yaml": "", "command": "", "name": name})
    answer = {
        "yaml": form.as_yaml(settings),
        "command": Task("", "train", ("train", *as_overrides(settings)), "", 0).command,
        "name": name,
        "taken": (board.places.runs / name).exists(),
        "candidates": num_candidates(settings.get("sweep")),
    }
    try:
        result = _run_in_worker(board, settings, "show", topic="check")
    except Superseded:
        return JSONResponse({"superseded": True})
    return JSONResponse({**answer, "problems": _problems(request, result.error) if result.error else []})


@router.post("/api/draft/plan")
def plan(request: Request, draft: Draft, brief: bool = False) -> Response:
    """What the run would need: `lowrank plan --calibrate`, or, sooner, `--brief`. Takes seconds; a newer request ends
    an older.
    """
    board = board_of(request)
    settings = settings_of(
        board.places, safe_name(draft.name, "my-model"), draft.values, draft.jobs, draft.extra, draft.sweep
    )
    try:
        result = _run_in_worker(board, settings, "plan", "--brief" if brief else "--calibrate", topic="plan")
    except Superseded:
        return JSONResponse({"superseded": True})
    if result.error:
        return JSONResponse({"problems": _problems(request, result.error)})
    texts, found = texts_of(request), result.content
    if found.get("changes_that_fit"):
        found["changes_that_fit"] = [vars(texts.sentence(each)) for each in found["changes_that_fit"]]
    return JSONResponse({"plan": found})


@router.post("/api/draft/start")
def start(request: Request, draft: Draft) -> Response:
    """Put the run into the queue, under a name that is free."""
    board = board_of(request)
    taken = {task.subject for task in board.queue.tasks.all() if not board.queue.outcome(task).over}
    name = wanted = safe_name(draft.name, "my-model")
    number = 2
    while (board.places.runs / name).exists() or name in taken:
        name, number = f"{wanted}-{number}", number + 1
    board.places.run(name)
    settings = settings_of(board.places, name, draft.values, draft.jobs, draft.extra, draft.sweep)
    model = settings.get("model")
    device = str(model.get("device", "auto")) if isinstance(model, dict) else "auto"
    arguments = board.arguments("train", "{task}/run.yaml", "--json")
    task = board.queue.add("train", arguments, subject=name, device=device, files={"run.yaml": form.as_yaml(settings)})
    return JSONResponse({"task": task.id, "name": name})


class SettingsText(BoardRequest):
    """A settings file, native or LLaMA-Factory's, as text."""

    text: str


@router.post("/api/draft/read")
def read(request: Request, body: SettingsText) -> Response:
    """A file as a draft: what `lowrank show` makes of it, and what it warned about."""
    board = board_of(request)
    if len(body.text.encode()) > _LONGEST_FILE:
        raise HTTPException(413, f"a settings file of more than {_LONGEST_FILE / 1e3:.0f} kB is not read")
    try:
        result = _run_in_worker(board, body.text, "show", topic="read")
    except Superseded:
        return JSONResponse({"superseded": True})
    if result.error:
        return JSONResponse({"problems": _problems(request, result.error)})
    try:
        confine(board.places, result.content)
    except ValueError as error:
        return JSONResponse({"problems": _problems(request, error)})
    name = Path(str(result.content.get("output_dir", ""))).name
    return JSONResponse(
        {"draft": _draft_of(result.content, name), "notes": texts_of(request).reply(result.notes[-4000:].strip())}
    )


@router.post("/api/draft/llamafactory")
def llamafactory(request: Request, draft: Draft) -> Response:
    """The draft as a LLaMA-Factory file."""
    board = board_of(request)
    name = safe_name(draft.name, "my-model")
    settings = settings_of(board.places, name, draft.values, draft.jobs, draft.extra, draft.sweep)
    return JSONResponse({"text": as_llamafactory(settings)})


@router.get("/api/models")
def models(request: Request) -> Response:
    """Models within the folders of the board."""
    return JSONResponse(models_in(board_of(request).places))


@router.get("/api/models/about")
def about_model(request: Request, path: str) -> Response:
    """What a base is, by the name that was typed: a folder here, or a model of the hub."""
    places = board_of(request).places
    if path == TINY["path"]:
        return JSONResponse({**TINY, "where": "here"})
    folder = places.readable_model(path)
    known = described(folder) if folder.is_dir() else None
    if known is not None:
        return JSONResponse({**known, "where": "here"})
    if folder.exists() or not is_hub_name(path):
        return JSONResponse({"problem": "no_model"})
    return JSONResponse(about_hub_model(path))


def _run_in_worker(board: Board, settings: dict[str, Any] | str, *arguments: str, topic: str) -> WorkerResult:
    """Run a command about settings that are in no file yet."""
    text = settings if isinstance(settings, str) else form.as_yaml(settings)
    scratch = board.places.own / "worker"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        file = Path(folder) / "settings.yaml"
        file.write_text(text, encoding="utf-8")
        command, *options = arguments
        shown = board.places.shown(file)
        result = board.warm_worker.run([command, shown, *options, "--json"], topic=topic)
    if result.error:
        result.content["error"] = {"message": result.error.replace(shown, "the settings")}
    return result


def _problems(request: Request, message: object) -> list[dict[str, Any]]:
    texts = texts_of(request)
    return [
        {"path": each.path, "missing": each.text.startswith("required"), **vars(texts.sentence(each.text))}
        for each in form.problems(str(message))
    ]


def _draft_of(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A complete configuration as a draft."""
    known = form.fields()
    found = form.flat(config)
    values = {k: v for k, v in found.items() if k in known or k in (*form.SOURCES, "model.path")}
    for key in ("resume", "overwrite", "output_dir"):
        values.pop(key, None)
    extra = {key: value for key, value in found.items() if key not in values and "." not in key}
    for key in ("resume", "overwrite", "output_dir"):
        extra.pop(key, None)
    sweep = config.get("sweep")
    rows = as_rows(sweep) if isinstance(sweep, dict) else []
    for key in ("sweep.grid", "sweep.random"):
        values.pop(key, None)
    jobs = [_row(job, config) for job in config.get("jobs") or () if isinstance(job, dict) and not sweep]
    if len(jobs) == 1 and jobs[0].get("name") == "default":
        jobs = []
    return {"name": safe_name(name, "my-model"), "values": values, "jobs": jobs, "extra": extra, "sweep": rows}


def _row(job: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A job as a row: its name and what differs from the top level."""
    top = form.flat({key: value for key, value in config.items() if key != "jobs"})
    own = form.flat({key: value for key, value in job.items() if key != "name"})
    different = {key: value for key, value in own.items() if top.get(key) != value}
    return {"name": job.get("name", ""), **different}


def _data_files(board: Board) -> list[dict[str, Any]]:
    from lowrank.board.data_files import data_files

    return data_files(board.places)
