"""A command as a folder. What became of it is read from what lies there, so a board that is killed forgets nothing.

.board/tasks/20261129-181500-3f2a/
    task.json      what was asked for: the words of the command
    run.yaml       the settings, where the command reads some
    starting       the child is being started
    child.json     the child's number and when it began
    output.jsonl   what the command printed with --json
    errors.txt     what it said besides
    stop           somebody asked it to stop
    ended.json     how it ended, once that was seen
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank.board import children
from lowrank.board.last_line import last_lines, message_lines
from lowrank.foreign_files import find_json, find_object

WAITING, RUNNING, DONE, STOPPED, FAILED, DIED = "waiting", "running", "done", "stopped", "failed", "died"
STATES = (WAITING, RUNNING, DONE, STOPPED, FAILED, DIED)
OUTPUT, ERRORS = "output.jsonl", "errors.txt"
_MAX_MESSAGE = 4000
"""Characters of a command's own words that are kept when it failed."""


@dataclass(frozen=True)
class Task:
    """What was asked for. `subject` is the run or file it is about, `device` the device queue it waits in."""

    id: str
    kind: str
    arguments: tuple[str, ...]
    subject: str
    created: float
    device: str = "auto"
    more: Mapping[str, Any] = field(default_factory=dict)
    """What a page wants to know again, as the folder an export is written to."""

    @property
    def command(self) -> str:
        """As a person would type it, in the board's folder."""
        return " ".join(["lowrank", *(_quoted(argument) for argument in self.arguments)])


@dataclass(frozen=True)
class Outcome:
    """How far a task is. `message` are the command's own words where it failed, `code` what it returned, if known."""

    state: str
    message: str = ""
    time: float | None = None
    code: int | None = None

    @property
    def over(self) -> bool:
        """Nothing will change any more."""
        return self.state not in (WAITING, RUNNING)


class TaskFolders:
    """All tasks of a board. It alone writes here."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._over: dict[str, Outcome] = {}
        self._tasks: dict[str, Task] = {}

    def create(
        self,
        kind: str,
        arguments: Iterable[str],
        *,
        subject: str = "",
        device: str = "auto",
        files: Mapping[str, str] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> Task:
        """A task that waits. `files` are written into its folder first; `{task}` in words is that folder."""
        now = time.time()
        name = f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{secrets.token_hex(2)}"
        folder = self.root / name
        inside = folder.relative_to(self.root.parent.parent).as_posix()
        own = tuple(
            argument.replace("{task}", inside) if argument.startswith("{task}") else argument for argument in arguments
        )
        task = Task(name, kind, own, subject, now, device, dict(more or {}))
        folder.mkdir(parents=True)
        for file, text in (files or {}).items():
            (folder / file).write_text(text, encoding="utf-8")
        _write(folder / "task.json", {**vars(task), "arguments": list(task.arguments)})
        return task

    def folder(self, task: str) -> Path:
        """Where a task's files lie. KeyError if there is no such task."""
        if self.get(task) is None:
            raise KeyError(task)
        return self.root / task

    def get(self, name: str) -> Task | None:
        """The task of this name."""
        if name not in self._tasks:
            if "/" in name or name.startswith(".") or not (content := find_json(self.root / name / "task.json")):
                return None
            known: dict[str, Any] = {key: value for key, value in content.items() if key in Task.__dataclass_fields__}
            known["arguments"] = tuple(content["arguments"])
            self._tasks[name] = Task(**known)
        return self._tasks[name]

    def all(self) -> list[Task]:
        """Every task, the oldest first."""
        names = sorted(path.name for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))
        return [task for name in names if (task := self.get(name)) is not None]

    def outcome(self, task: Task) -> Outcome:
        """How far it is, from its files and from whether its process lives."""
        if task.id in self._over:
            return self._over[task.id]
        folder = self.root / task.id
        ended = find_json(folder / "ended.json")
        if ended:
            self._over[task.id] = Outcome(
                ended["state"], ended.get("message", ""), ended.get("time"), ended.get("code")
            )
            return self._over[task.id]
        if (folder / "child.json").exists() or (folder / "starting").exists():
            return Outcome(RUNNING)
        return Outcome(STOPPED if (folder / "stop").exists() else WAITING)

    def child(self, task: Task) -> children.Identity | None:
        """The process that does it, living or not; None if none was started."""
        folder = self.root / task.id
        content = find_json(folder / "child.json")
        if content:
            return children.Identity.read(content)
        if (folder / "starting").exists():
            return children.find(task.id)
        return None

    def started(self, task: Task, identity: children.Identity) -> None:
        """Note which process does it."""
        _write(self.root / task.id / "child.json", identity.as_dict())

    def ended(self, task: Task, code: int | None) -> Outcome:
        """Its process is gone: say how it ended, by its last words, and keep that."""
        folder = self.root / task.id
        state, message = final_state(folder, code)
        if code is None:  # another board started it
            code = ((self.result(task) or {}).get("error") or {}).get("exit_code")
        content = {"state": state, "message": message, "time": time.time(), "code": code}
        _write(folder / "ended.json", content)
        return self.outcome(task)

    def result(self, task: Task) -> dict[str, Any] | None:
        """The last JSON object the command printed."""
        return _last_object(self.root / task.id / OUTPUT)

    def remove(self, task: Task) -> None:
        """Forget a task that is over."""
        shutil.rmtree(self.root / task.id, ignore_errors=True)
        self._tasks.pop(task.id, None)
        self._over.pop(task.id, None)


def final_state(folder: Path, code: int | None) -> tuple[str, str]:
    """Return the state of a task whose process is gone, and a message for people.

    `code`: None where another board has started it."""
    last = _last_object(folder / OUTPUT) or {}
    error = last.get("error")
    interrupted = last.get("interrupted") or (isinstance(error, dict) and error.get("exit_code") == 130)
    if isinstance(error, dict) and not interrupted:
        return FAILED, str(error.get("message", ""))[:_MAX_MESSAGE]
    stop_requested = (folder / "stop").exists()
    if interrupted or code == 130 or (stop_requested and code != 0):
        return STOPPED, ""
    if code == 0 or (code is None and last and last.get("event") in (None, "run_finished", "closed")):
        return DONE, ""
    message = "\n".join(message_lines(folder / ERRORS, 30))[-_MAX_MESSAGE:]
    if code is not None and code > 0:  # a check that says no with its result, as export's exit code 6
        return FAILED, message
    return DIED, message


def _last_object(path: Path) -> dict[str, Any] | None:
    found = map(find_object, reversed(last_lines(path, 5)))
    return next((line for line in found if line is not None), None)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all; a lost machine may lose the last seconds, so there is no sync."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    partial.replace(path)


def _quoted(argument: str) -> str:
    safe = argument and all(c.isalnum() or c in "_-./=:,+@%" for c in argument)
    return argument if safe else "'" + argument.replace("'", "'\\''") + "'"
