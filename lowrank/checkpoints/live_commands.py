"""Commands to a run that is training: files in its folder, so they work from another terminal, container or machine.

    commands/000007.json      a command: written under another name and renamed, never changed afterwards
    commands/.000007.claim    its number is taken, by whoever wrote it
    commands/log.jsonl        the run's replies, one line each, as soon as a command was carried out or refused
    commands/state.json       what the run's jobs were doing a moment ago

A run carries a command out between two steps, once. Its checkpoint lists the commands that are in it; one that was
answered later is carried out again at the same step when the run goes on from there, and so has the same effect.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowrank.checkpoints.atomic import write_text
from lowrank.errors import LowrankError, OutputError
from lowrank.foreign_files import parse_json, read_json

FOLDER = "commands"
FORMER_FOLDER = "orders"
"""Its name in runs begun before 2026-12; it is renamed when such a run goes on."""
LOG = "log.jsonl"
STATE = "state.json"
_NAME = re.compile(r"(\d{6,12})\.json")
_MOST_ATTEMPTS = 10_000
KINDS = ("add", "clone", "pause", "priority", "resume", "set", "stop")
"""What the commands of the files may be (pipelines/live_commands.py)."""


@dataclass(frozen=True)
class LiveCommand:
    """What somebody wants of a run. `values` depends on the kind (pipelines/live_commands.py)."""

    number: int
    kind: str
    job: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    sender: str = ""
    """Process and machine, for the log."""
    time: float = 0.0
    """Seconds since 1970."""


@dataclass(frozen=True)
class CommandReply:
    """What came of a command. `iteration`: how many the run had done when it was carried out, or refused."""

    number: int
    iteration: int
    done: bool
    text: str
    time: float


def command_folder(run: Path) -> Path:
    """Where the run's commands are, or will be."""
    former = run / FORMER_FOLDER
    return former if former.is_dir() and not (run / FOLDER).exists() else run / FOLDER


def send(run: Path, kind: str, job: str | None = None, values: Mapping[str, Any] | None = None) -> LiveCommand:
    """Put a command into the run's folder; it has a number that no other writer has. OutputError if that cannot be."""
    assert kind in KINDS, kind
    folder = command_folder(run)
    try:
        if folder.name == FOLDER:  # the other is renamed when the run goes on, and must not come again then
            folder.mkdir(exist_ok=True)
        number = _claim(folder)
        sender = f"process {os.getpid()} on {socket.gethostname()}"
        command = LiveCommand(number, kind, job, dict(values or {}), sender, round(time.time(), 3))
        text = json.dumps(asdict(command), ensure_ascii=False, indent=1, default=str)
        write_text(folder / _name(number), text + "\n")
    except OSError as error:
        raise OutputError(f"{folder}: the command cannot be written ({error})") from error
    return command


def replies(run: Path) -> dict[int, CommandReply]:
    """The last reply to each command that has one, by its number."""
    found: dict[int, CommandReply] = {}
    try:
        lines = (command_folder(run) / LOG).read_bytes().split(b"\n")
    except FileNotFoundError:
        return found
    for line in lines:
        with suppress(LowrankError, KeyError, TypeError, ValueError):  # torn by a crash of the machine
            one = parse_json(line, LOG, OutputError)
            iteration = one["iteration"] if "iteration" in one else one["tick"]  # as runs before 2026-12 wrote it
            reply = CommandReply(
                int(one["number"]), int(iteration), bool(one["done"]), str(one["text"]), float(one["time"])
            )
            found[reply.number] = reply
    return found


def read_state(run: Path) -> dict[str, Any]:
    """What the run's jobs did when it last wrote it (pipelines/live_commands.py); empty if it never has."""
    path = command_folder(run) / STATE
    return read_json(path, OutputError) if path.is_file() else {}


class CommandQueue:
    """The commands of a run, as the run sees them."""

    def __init__(self, run: Path, carried_out: Collection[int] = ()) -> None:
        """`carried_out`: those that are in the checkpoint from which the run goes on."""
        self._run, self._folder = run, command_folder(run)
        self.carried_out = set(carried_out)
        self._answered = {number: reply for number, reply in replies(run).items() if number not in self.carried_out}
        self.carried_out |= {number for number, reply in self._answered.items() if not reply.done}

    def open(self) -> None:
        """Make the folder, of the former one where the run has that. What writers that died have left stays: a claimed
        number without a command is skipped, and nobody can tell it from one that is being written."""
        if self._folder.name == FORMER_FOLDER:
            self._folder = self._folder.rename(self._run / FOLDER)
        self._folder.mkdir(exist_ok=True)

    def due(self, iteration: int) -> list[LiveCommand]:
        """What is to be carried out before the next step: first what was carried out here before the run was killed,
        in the order of that time, and then what is new."""
        found = self._numbers() - self.carried_out
        again = [
            number for number in self._answered if number in found and self._answered[number].iteration <= iteration
        ]
        new = sorted(number for number in found if number not in self._answered)
        return [command for number in (*again, *new) if (command := self._read(number, iteration)) is not None]

    def later(self) -> bool:
        """Whether some command waits for the step at which it was carried out before."""
        return bool(self._answered.keys() - self.carried_out)

    def acknowledge(self, command: LiveCommand, iteration: int, text: str, *, done: bool) -> None:
        """Write the reply, durably; the same reply is not written twice."""
        self.carried_out.add(command.number)
        before = self._answered.pop(command.number, None)
        if before is not None and (before.done, before.text) == (done, text):
            return
        reply = CommandReply(command.number, iteration, done, text, round(time.time(), 3))
        line = {**asdict(reply), "kind": command.kind, "job": command.job}
        descriptor = os.open(self._folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, (json.dumps(line, ensure_ascii=False) + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Write what the jobs do now; not synced, since it is of the moment."""
        partial = self._folder / f".{STATE}.{os.getpid()}"
        partial.write_text(json.dumps(state, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        os.replace(partial, self._folder / STATE)

    def _numbers(self) -> set[int]:
        try:
            return {int(match[1]) for name in os.listdir(self._folder) if (match := _NAME.fullmatch(name))}
        except FileNotFoundError:
            return set()

    def _read(self, number: int, iteration: int) -> LiveCommand | None:
        path = self._folder / _name(number)
        try:
            content = read_json(path, OutputError)
            kind, job = str(content["kind"]), content.get("job")
            if kind not in KINDS or not isinstance(job, (str, type(None))):
                raise OutputError(f"{path}: there is no such command")
            command = LiveCommand(number, kind, job, dict(content["values"]), str(content.get("sender")))
        except (LowrankError, KeyError, TypeError, ValueError) as error:
            self.acknowledge(LiveCommand(number, "?"), iteration, f"{path.name} is not a command ({error})", done=False)
            return None
        return command


def _name(number: int) -> str:
    return f"{number:06d}.json"


def _claim(folder: Path) -> int:
    """A number that is ours: of two writers, one makes the file."""
    taken = [int(match[1]) for name in os.listdir(folder) if (match := re.fullmatch(r"\.?(\d{6,12})\..+", name))]
    first = max(taken, default=0) + 1
    for number in range(first, first + _MOST_ATTEMPTS):
        try:
            os.close(os.open(folder / f".{number:06d}.claim", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            continue
        return number
    raise OutputError(f"{folder}: no number is free for a command")
