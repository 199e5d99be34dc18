"""One board: its folders, its queue, its warm worker, and what was read of runs; what all pages share."""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lowrank.board.curves import CurvesOfRuns
from lowrank.board.places import OutsideError, Places
from lowrank.board.queue import Queue
from lowrank.board.runs import RUNNING, RunEntry, all_runs, read_json, read_run
from lowrank.board.tasks import Outcome, Task
from lowrank.board.warm_worker import WarmWorker
from lowrank.checkpoints.run_folder import MARKER, METRICS, writer_in

_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Options:
    """How the board was started."""

    allow_code: bool = False
    upload_bytes: int = 8 << 30
    upload_seconds: float = 3600.0
    header_seconds: float = 10.0
    """Timeout for the headers of a request; a slower connection is closed."""
    streams: int = 200
    """Open event streams at the most; beyond, a page asks again later."""


class Board:
    """What all pages share."""

    def __init__(self, places: Places, options: Options | None = None) -> None:
        self.places, self.options = places, options or Options()
        places.make()
        self.serve_token = _kept_secret(places.own / "serve_token")
        self.warm_worker = WarmWorker(places.folder, places.own / "worker", allow_code=self.options.allow_code)
        self.queue = Queue(
            places,
            external_run_active=self._external_run_active,
            before_start=lambda task: self.warm_worker.close(),
            environment={"LOWRANK_TOKEN": self.serve_token},
        )
        self.curves = CurvesOfRuns()
        self._seen: tuple[float, str] = (0.0, "")
        self._lock = threading.Lock()

    def open(self) -> None:
        """Start the queue. Chats of an earlier board are closed: nobody holds their pages' conversation."""
        gpus()
        for task in self.queue.running():
            if task.kind == "serve":
                self.queue.stop(task.id)
        self.queue.open()

    def close(self) -> None:
        """Runs go on."""
        for task in self.queue.running():
            if task.kind == "serve":
                self.queue.stop(task.id)
        self.queue.close()
        self.warm_worker.close()

    def arguments(self, *arguments: str) -> list[str]:
        """The words of a command that reads settings or a model, with the permission the board was given."""
        return [*arguments, *(["--allow-code"] if self.options.allow_code else [])]

    def runs(self) -> list[RunEntry]:
        """All runs, the latest first."""
        return all_runs(self.places)

    def run(self, name: str) -> RunEntry | None:
        """A run by name; None if there is none."""
        folder = self.places.run(name)
        return read_run(name, folder) if (folder / MARKER).is_file() else None

    def train_tasks(self, name: str) -> list[Task]:
        """The tasks that train into a run, the oldest first."""
        return [task for task in self.queue.tasks.all() if task.kind == "train" and task.subject == name]

    def tasks_about(self, subject: str, *kinds: str) -> list[tuple[Task, Outcome]]:
        """Tasks of these kinds about a run, the latest first."""
        found = [t for t in self.queue.tasks.all() if t.subject == subject and t.kind in kinds]
        return [(task, self.queue.outcome(task)) for task in reversed(found)]

    def fingerprint(self) -> str:
        """Changes whenever a list of runs or tasks would look different."""
        with self._lock:
            moment, seen = self._seen
            if time.monotonic() - moment < _LOOK_SECONDS:
                return seen
            tasks = [(task.id, self.queue.outcome(task).state) for task in self.queue.tasks.all()]
            waiting = [task.id for task in self.queue.waiting()]
            files = []
            for run in os.scandir(self.places.runs):
                for name in ("summary.json", MARKER, METRICS):
                    try:
                        status = os.stat(os.path.join(run.path, name))
                        files.append((run.name, name, status.st_mtime_ns if name[0] != "m" else status.st_size))
                    except OSError:
                        continue
            self._seen = (time.monotonic(), f"{hash((tuple(tasks), tuple(waiting), tuple(sorted(files)))):x}")
            return self._seen[1]

    def machine(self) -> dict[str, Any]:
        """Memory, disk and processors of this machine, and its GPUs where a driver tells."""
        memory, disk = psutil.virtual_memory(), shutil.disk_usage(self.places.folder)
        return {
            "memory_free": memory.available, "memory": memory.total, "disk_free": disk.free, "disk": disk.total,
            "cores": os.cpu_count() or 1, "gpus": gpus(),
        }  # fmt: skip

    def _external_run_active(self) -> bool:
        """Whether a run that was started by hand takes the device."""
        own = {child.pid for task in self.queue.running() if (child := self.queue.tasks.child(task))}
        with os.scandir(self.places.runs) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".")]
        for name in names:
            try:
                folder = self.places.run(name)
            except OutsideError:
                continue
            marker = read_json(folder / MARKER)
            if marker.get("pid") not in own and writer_in(marker).lives and read_run(name, folder).state == RUNNING:
                return True
        return False


_GPU_SECONDS = 10.0
_GPUS: list[Any] = [-_GPU_SECONDS, []]
_UPDATING_GPUS = threading.Lock()


def gpus() -> list[dict[str, Any]]:
    """Name, free and whole memory (bytes) of each NVIDIA GPU, as its driver's tool last said. It is run every few
    seconds, beside: where a driver wakes up for it, that takes a second or more, and no page waits.
    """
    if time.monotonic() - _GPUS[0] > _GPU_SECONDS and _UPDATING_GPUS.acquire(blocking=False):
        threading.Thread(target=_update_gpus, name="gpus", daemon=True).start()
    return _GPUS[1]


def _update_gpus() -> None:
    try:
        _GPUS[:] = [time.monotonic(), _query_gpus()]
    finally:
        _UPDATING_GPUS.release()


def _query_gpus() -> list[dict[str, Any]]:
    import subprocess

    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = ["--query-gpu=name,memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run([tool, *query], capture_output=True, text=True, timeout=5, check=True).stdout
        rows = [line.split(", ") for line in output.splitlines() if line.strip()]
        return [{"name": r[0], "free": int(r[1]) << 20, "total": int(r[2]) << 20} for r in rows]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return []


def _kept_secret(path: Path) -> str:
    """A secret that is made once and kept in a file only its owner can read."""
    try:
        kept = path.read_text(encoding="utf-8").strip()
        if kept:
            return kept
    except OSError:
        pass
    secret = secrets.token_urlsafe(24)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secret)
    return secret


def kept_token(places: Places) -> str:
    """The token of a board, the same after a restart: an open page goes on."""
    places.make()
    return _kept_secret(places.own / "token")
