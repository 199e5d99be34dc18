"""Live commands to the jobs of a run that trains: what a page wants, as a file and as a command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from lowrank.board import form
from lowrank.board.body import BoardRequest
from lowrank.board.places import Places, safe_name
from lowrank.board.settings_file import as_overrides, confine
from lowrank.board.tasks import Task
from lowrank.checkpoints.live_commands import CommandReply, command_folder, read_state, replies
from lowrank.errors import ConfigError, LowrankError
from lowrank.foreign_files import find_json
from lowrank.foreign_yaml import load_yaml
from lowrank.third_party import code_named

_TEXTS = ("default_system", "prompt_tuning_init_text")
"""Settings whose values are read by nobody but the model."""
_SHOWN = 30


class CommandRequest(BoardRequest):
    """One command. `changes`: texts or values by dotted setting; they stand over `text`, settings of a job as YAML."""

    kind: Literal["add", "clone", "pause", "priority", "resume", "set", "stop"]
    job: str = Field("", max_length=300)
    changes: dict[str, Any] = Field(default_factory=dict)
    text: str = Field("", max_length=64 << 10)
    name: str = Field("", max_length=120)
    """Of the job that comes, with add and clone."""
    from_start: bool = False
    priority: int = Field(0, ge=-1000, le=1000)


@dataclass(frozen=True)
class CommandDraft:
    """The arguments of `send`, and those of the command line; `file` is what `lowrank add` reads."""

    kind: str
    job: str | None
    values: dict[str, Any]
    arguments: list[str]
    file: tuple[Path, str] | None = field(default=None)

    @property
    def command_line(self) -> str:
        """As a person would type it, in the board's folder."""
        return Task("", "", tuple(self.arguments), "", 0).command


def draft_command(places: Places, run: str, request: CommandRequest, *, allow_code: bool) -> CommandDraft:
    """The command. OutsideError for paths the board may not read, ConfigError for settings that are none, or that name
    code where the board was not started with --allow-code."""
    folder = places.shown(places.run(run))
    settings = _merged(_read(request.text), form.entry(request.changes))
    _check(places, settings, allow_code)
    if request.kind == "add":
        return _added(places, run, folder, request.name, settings)
    changes = as_overrides(settings)
    if not request.job:
        raise ConfigError("choose an adapter")
    arguments = [request.kind, folder, request.job]
    if request.kind == "set":
        if not changes:
            raise ConfigError("no setting was changed")
        return CommandDraft("set", request.job, {"changes": changes}, [*arguments, *changes])
    if request.kind == "clone":
        own = {"changes": changes, "name": request.name or None, "from_start": request.from_start}
        arguments += changes + (["--name", request.name] if request.name else [])
        return CommandDraft("clone", request.job, own, [*arguments, *(["--from-start"] if request.from_start else [])])
    if request.kind == "priority":
        number = [str(request.priority)] if request.priority >= 0 else ["--", str(request.priority)]
        return CommandDraft("priority", request.job, {"priority": request.priority}, [*arguments, *number])
    return CommandDraft(request.kind, request.job, {}, arguments)


def _added(places: Places, run: str, folder: str, name: str, settings: dict[str, Any]) -> CommandDraft:
    given: Any = name or settings.get("name")
    if not isinstance(given, str) or not given:
        raise ConfigError("name: the new adapter needs a name")
    name = given
    settings = {"name": name, **{key: value for key, value in settings.items() if key != "name"}}
    path = places.own / "added" / f"{safe_name(run, 'run')}-{safe_name(name, 'job')}.yaml"
    return CommandDraft(
        "add", name, {"settings": settings}, ["add", folder, places.shown(path)], (path, form.as_yaml(settings))
    )


def _read(text: str) -> dict[str, Any]:
    try:
        content = load_yaml(text, form.MOST_VALUES) if text.strip() else {}
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{place}{error.problem or error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"the settings are no YAML ({str(error)[:300]})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError("expected settings of an adapter, as `adapter: {rank: 32}`")
    return content


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(under)
    for key, value in over.items():
        known = found.get(key)
        found[key] = _merged(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return found


def _check(places: Places, settings: Mapping[str, Any], allow_code: bool) -> None:
    confine(places, {"jobs": [settings]})
    named = code_named(settings, lambda setting: setting not in _TEXTS)  # of any setting: nobody here knows them all
    code = [] if allow_code else [f"{place}: {name!r}" for place, name in named]
    if code:
        raise ConfigError(
            f"{'; '.join(code)} is code that does not come with lowrank; the board runs it if it was started with "
            "--allow-code"
        )


def write_file(draft: CommandDraft) -> None:
    """What the command line of a draft reads, so that it can be typed."""
    if draft.file is not None:
        path, text = draft.file
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


@dataclass(frozen=True)
class LoggedCommand:
    """A command in a run folder, whoever sent it."""

    number: int
    command_line: str
    time: float | None
    reply: CommandReply | None


def commands_of(places: Places, run: str) -> list[LoggedCommand]:
    """The last commands of a run, the latest first."""
    folder = command_folder(places.run(run))
    try:
        numbers = sorted((int(path.stem) for path in folder.glob("[0-9]*.json") if path.stem.isdecimal()), reverse=True)
    except OSError:
        return []
    known = replies(places.run(run)) if numbers else {}
    return [_logged(places, run, folder, number, known.get(number)) for number in numbers[:_SHOWN]]


def _logged(places: Places, run: str, folder: Path, number: int, reply: CommandReply | None) -> LoggedCommand:
    content = find_json(folder / f"{number:06d}.json") or {}
    time = content.get("time")
    values = content.get("values")
    command_line = _command_line(places.shown(places.run(run)), content, values if isinstance(values, dict) else {})
    return LoggedCommand(number, command_line, time if isinstance(time, (int, float)) else None, reply)


def _command_line(run: str, content: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """That sends this command; with add the file is anybody's, so the name of the job stands for it."""
    kind, job = str(content.get("kind", "?"))[:20], content.get("job")
    arguments = [kind, run, *([str(job)] if job else [])]
    listed = values.get("changes")
    arguments += [str(argument)[:300] for argument in listed[:20]] if isinstance(listed, list) else []
    if values.get("name"):
        arguments += ["--name", str(values["name"])]
    if values.get("from_start"):
        arguments.append("--from-start")
    if kind == "priority":
        arguments.append(str(values.get("priority"))[:12])
    return Task("", "", tuple(arguments), "", 0).command[:1000]


def live_jobs(run: Path) -> list[dict[str, Any]]:
    """What the jobs of a run were doing when it last said so; empty where it never did, or takes no commands."""
    jobs = _state(run).get("jobs")
    return [job for job in jobs if isinstance(job, dict) and job.get("name")] if isinstance(jobs, list) else []


def live_memory(run: Path) -> dict[str, Any]:
    """`used` and `planned` bytes, as the run last said."""
    memory = _state(run).get("memory")
    return memory if isinstance(memory, dict) else {}


def accepts_commands(run: Path) -> bool:
    """Whether the run, which is known to be training, has begun to look for commands and not ended yet."""
    state = _state(run)
    return bool(state) and not state.get("ended")


def _state(run: Path) -> dict[str, Any]:
    if command_folder(run).is_symlink():  # it may lead anywhere, and the board would write there
        return {}
    try:
        return read_state(run)
    except LowrankError:
        return {}
