"""The task queue: one task at a time per device, in an order that can be changed, as long as the board runs."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping

from lowrank.board import children
from lowrank.board.places import Places
from lowrank.board.tasks import ERRORS, OUTPUT, RUNNING, WAITING, Outcome, Task, TaskFolders

_LOG = logging.getLogger(__name__)
_FORGIVEN_SECONDS = 10.0
"""A child may miss a request to stop while it starts; the request is repeated after this."""


class Queue:
    """Starts waiting tasks, sees running ones end. All its methods may be called from any thread."""

    def __init__(
        self,
        places: Places,
        *,
        external_run_active: Callable[[], bool] = lambda: False,
        before_start: Callable[[Task], None] = lambda task: None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.places = places
        self.tasks = TaskFolders(places.tasks)
        self._external_run_active, self._before_start = external_run_active, before_start
        self._environment = dict(environment or {})
        self._queue_file = places.own / "order.json"
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._stop_requests: dict[str, float] = {}
        self._lock = threading.RLock()
        self._awake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="queue", daemon=True)

    def open(self) -> None:
        """Start the thread, which first looks at what an earlier board left."""
        self._thread.start()

    def close(self) -> None:
        """Start nothing more. What runs goes on."""
        self._closed = True
        self._awake.set()
        self._thread.join(10)

    def add(self, kind: str, arguments: list[str], **about: object) -> Task:
        """A new task at the end of the queue."""
        with self._lock:
            task = self.tasks.create(kind, arguments, **about)  # type: ignore[arg-type]
        self._awake.set()
        return task

    def waiting(self) -> list[Task]:
        """Those that wait, the next first."""
        with self._lock:
            found = [task for task in self.tasks.all() if self.tasks.outcome(task).state == WAITING]
            wanted = {name: place for place, name in enumerate(self._read_queue_file())}
            return sorted(found, key=lambda task: (wanted.get(task.id, len(wanted)), task.created))

    def running(self) -> list[Task]:
        """Those whose process lives, as far as was last seen."""
        return [task for task in self.tasks.all() if self.tasks.outcome(task).state == RUNNING]

    def move(self, name: str, by: int) -> None:
        """Put a waiting task earlier (-1) or later (1); -999 makes it the next."""
        with self._lock:
            names = [task.id for task in self.waiting()]
            if name not in names:
                return
            place = names.index(name)
            names.insert(min(max(0, place + by), len(names) - 1), names.pop(place))
            partial = self._queue_file.with_suffix(".partial")
            partial.write_text(json.dumps(names), encoding="utf-8")
            partial.replace(self._queue_file)

    def stop(self, name: str) -> None:
        """Take a waiting task out, ask a running one to save what it has and end."""
        with self._lock:
            task = self.tasks.get(name)
            if task is None or self.tasks.outcome(task).over:
                return
            (self.tasks.folder(name) / "stop").touch()
            if self.tasks.outcome(task).state == RUNNING:
                self._request_stop(task)
        self._awake.set()

    def kill(self, name: str) -> None:
        """End a running task at once, without a save; for one that was asked and does not end."""
        with self._lock:
            task = self.tasks.get(name)
            identity = self.tasks.child(task) if task else None
            if task is not None and identity is not None and (self.tasks.folder(name) / "stop").exists():
                children.kill(identity)
        self._awake.set()

    def outcome(self, task: Task) -> Outcome:
        """How far a task is."""
        return self.tasks.outcome(task)

    def wait(self, name: str, seconds: float) -> Outcome:
        """Until a task is over or so many seconds have passed; for tests and short commands."""
        end = time.monotonic() + seconds
        task = self.tasks.get(name)
        assert task is not None
        while not (outcome := self.tasks.outcome(task)).over and time.monotonic() < end:
            time.sleep(0.05)
        return outcome

    def look(self) -> None:
        """One round: record which tasks have ended, and start the next of each device."""
        with self._lock:
            taken = set()
            for task in self.running():
                if self._still_runs(task):
                    taken.add(task.device)
            for task in self.waiting():
                if task.device not in taken and not self._closed and not self._external_run_active():
                    self._start(task)
                    taken.add(task.device)

    def _work(self) -> None:
        while not self._closed:
            try:
                self.look()
            except Exception:  # the queue goes on, whatever one folder is like
                _LOG.exception("the queue stumbled")
            self._awake.wait(0.5)
            self._awake.clear()

    def _still_runs(self, task: Task) -> bool:
        child = self._children.get(task.id)
        code = child.poll() if child is not None else None
        identity = self.tasks.child(task)
        if code is None and identity is not None and identity.lives:
            requested = self._stop_requests.get(task.id)
            if requested is not None and time.monotonic() - requested > _FORGIVEN_SECONDS:
                self._request_stop(task)
            return True
        if child is not None:  # it has ended, or is about to: it may be a zombie that was not waited for
            code = child.wait()
        self._children.pop(task.id, None)
        self.tasks.ended(task, code)
        return False

    def _start(self, task: Task) -> None:
        folder = self.tasks.folder(task.id)
        self._before_start(task)
        (folder / "starting").touch()
        try:
            child = children.start(
                task.arguments, cwd=self.places.folder, out=folder / OUTPUT, errors=folder / ERRORS, task=task.id,
                more=self._environment,
            )  # fmt: skip
        except OSError as error:
            (folder / ERRORS).write_text(f"{error}\n", encoding="utf-8")
            self.tasks.ended(task, 1)
            return
        self._children[task.id] = child
        identity = children.Identity.of(child.pid)
        if identity is not None:
            self.tasks.started(task, identity)

    def _request_stop(self, task: Task) -> None:
        identity = self.tasks.child(task)
        if identity is None:
            return
        again = task.id in self._stop_requests
        self._stop_requests[task.id] = time.monotonic()
        stop = self.places.runs / task.subject / "stop"
        if task.kind == "train" and stop.parent.is_dir() and (again or os.name == "nt"):  # which has no such signal
            stop.touch()
        else:
            children.request_stop(identity)

    def _read_queue_file(self) -> list[str]:
        try:
            value = json.loads(self._queue_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return [str(name) for name in value] if isinstance(value, list) else []
