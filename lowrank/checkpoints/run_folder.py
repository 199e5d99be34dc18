"""The run folder: who may write in it, what is in it already, and where a run goes on.

`.lowrank.json` marks a folder as a run's and says what in it is the run's own and who writes it;
`.lowrank.lock` is locked by the operating system as long as that process lives, so a lock is never stale.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from filelock import FileLock, Timeout

from lowrank.checkpoints.adapter_folder import JOB_FOLDERS
from lowrank.checkpoints.atomic import is_leftover, recover, remove, write_text
from lowrank.checkpoints.live_commands import FOLDER as COMMANDS
from lowrank.checkpoints.live_commands import FORMER_FOLDER as FORMER_COMMANDS
from lowrank.checkpoints.steps import latest_checkpoint, list_checkpoints
from lowrank.errors import OutputError, raise_all

MARKER = ".lowrank.json"
LOCK = ".lowrank.lock"
STOP = "stop"
"""Whoever writes this file into a run folder asks the run to save and end."""
CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
"""The resolved configuration."""
METRICS = "metrics.jsonl"
"""What was logged (report/reporters/metrics.py)."""
SWEEP_TABLE = "sweep.json"
"""The ranked candidates of a sweep (search/ranking.py)."""
SHARES = "shares"
"""Run folders of a run whose jobs are trained in shares (checkpoints/shared_folder.py)."""
RUN_FILES = (
    CHECKPOINTS, CONFIG, "demo.json", "summary.json", METRICS, "loss.png", "tensorboard", "report.html",
    "data_report.json", "predict", "eval", COMMANDS, FORMER_COMMANDS, "best",
    SWEEP_TABLE, "optuna.db", SHARES,
)  # fmt: skip
"""What a run writes into its folder, besides one folder per job."""


@dataclass
class RunFolder:
    """A run folder that this process alone may write to, until it is closed."""

    path: Path
    checkpoint: Path | None
    """Where to go on; None: from the beginning."""
    notes: tuple[str, ...]
    """What a person should know."""
    _lock: FileLock = field(repr=False)
    _overwrite_pending: bool = field(default=False, repr=False)

    def clear(self) -> None:
        """Delete the run that is to be overwritten, if one is: once nothing can be refused any more."""
        if self._overwrite_pending:
            for name in sorted(_entries(self.path), key=lambda name: (name != CHECKPOINTS, name)):
                remove(self.path / name)
            self._overwrite_pending = False

    @property
    def checkpoints(self) -> Path:
        """The root of the checkpoints."""
        return self.path / CHECKPOINTS

    def own(self, names: Iterable[str]) -> None:
        """Say that these names at the top are the run's, besides those it had."""
        owned = _owned(self.path)
        if not {*names} <= {*owned}:
            _mark(self.path, {*owned, *names})

    def close(self) -> None:
        """Let others write."""
        self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Writer:
    """Who took a run folder last."""

    lives: bool | None
    """Whether the process still runs; None if it is of another machine or container, where nobody here can see it."""
    started: float
    """Seconds since 1970; 0 where that is not known."""


_STARTED_BEFORE = 30.0
"""Seconds that a process may have lived before it took its folder, at the least; importing takes long on cold disks."""


def writer_of(output_dir: Path) -> Writer:
    """The process that took a run folder last. OutputError for a marker that cannot be read."""
    return writer_in(_read_marker(output_dir))


def writer_in(marker: Mapping[str, Any]) -> Writer:
    """The process that a run folder's marker (MARKER) names. Never by the lock: to try it would disturb a start."""
    try:
        started = datetime.fromisoformat(str(marker.get("started"))).timestamp()
    except (ValueError, OverflowError):
        started = 0.0
    if marker.get("host") != socket.gethostname():
        return Writer(None if marker else False, started)
    try:
        process = psutil.Process(int(marker["pid"]))
        alive = process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= started + _STARTED_BEFORE
    except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
        alive = False
    return Writer(alive, started)


def open_run_folder(
    output_dir: Path, *, jobs: Sequence[str], resume: bool = False, overwrite: bool = False, also: Iterable[str] = ()
) -> RunFolder:
    """Take the folder for a run with these job names; `also`: other names the run will write at its top.

    What a crashed run left half-done is put right. With `overwrite` the old run stands until `clear`. OutputError if
    the folder is not empty and neither `resume` nor `overwrite` is asked for, holds what lowrank did not write, is in
    use, or has nothing to resume.
    """
    assert not (resume and overwrite), "the configuration refuses this"
    output_dir = Path(output_dir)
    _refuse_foreign(output_dir)
    lock = _take(output_dir)
    try:
        notes = [note for folder in _folders(output_dir) for note in recover(folder)]
        owned = {*_owned(output_dir), *jobs, *also}
        present = _entries(output_dir)
        checkpoint = None
        if present and overwrite:
            _refuse_to_delete_foreign(output_dir, owned)
        elif present and resume:
            _refuse_shares(output_dir, present)
            checkpoint, more = _where_to_resume(output_dir)
            notes += more
        elif present:
            raise OutputError(
                f"{output_dir} is not empty: a run has left {_listed(present)} in it.\n"
                "  - resume=true goes on from its last checkpoint\n"
                "  - overwrite=true deletes that run and starts anew\n"
                "  or choose another output_dir"
            )
        elif resume:
            notes.append(f"{output_dir} is empty: nothing to resume, starting from the beginning")
        _mark(output_dir, owned)
    except BaseException:
        lock.release()
        raise
    return RunFolder(output_dir, checkpoint, tuple(notes), lock, bool(present) and overwrite)


def open_merged_folder(
    output_dir: Path, *, jobs: Sequence[str], resume: bool = False, overwrite: bool = False
) -> RunFolder:
    """Take the folder of a run whose jobs are trained in shares, for whoever starts them all, or merges what came of
    them. OutputError as from `open_run_folder`, and where a run without shares lies there."""
    present = _entries(output_dir)
    if present != [SHARES]:
        _refuse_foreign(output_dir)
    lock = _take(output_dir)
    try:
        notes = tuple(note for folder in _folders(output_dir) for note in recover(folder))
        owned = {*_owned(output_dir), *jobs}
        present = _entries(output_dir)
        if present and overwrite:
            _refuse_to_delete_foreign(output_dir, owned)
        elif present and not resume:
            raise OutputError(
                f"{output_dir} is not empty: a run has left {_listed(present)} in it.\n"
                "  - resume=true goes on with each of its shares\n"
                "  - overwrite=true deletes that run and starts anew\n"
                "  or choose another output_dir"
            )
        elif present:
            refuse_unshared(output_dir)
        _mark(output_dir, owned)
    except BaseException:
        lock.release()
        raise
    return RunFolder(output_dir, None, notes, lock, bool(present) and overwrite)


def refuse_unshared(output_dir: Path) -> None:
    """OutputError where a run lies that was not begun in shares."""
    if (output_dir / CHECKPOINTS).is_dir():
        raise OutputError(
            f"{output_dir} holds a run that was not begun in shares, so no share goes on with it; leave share and "
            "devices out to go on, or choose another output_dir"
        )


def _refuse_shares(output_dir: Path, present: Sequence[str]) -> None:
    if SHARES in present:
        shares = sorted(path.name for path in (output_dir / SHARES).iterdir() if path.is_dir() and "-of-" in path.name)
        raise OutputError(
            f"{output_dir} was trained in shares ({_listed(shares)}), and goes on in the same ones: give devices or "
            "share as it was begun with; `lowrank report` merges them"
        )


def _refuse_foreign(output_dir: Path) -> None:
    """Before anything is written: the folder is empty, or a run's, or not for us."""
    if output_dir.exists() and not output_dir.is_dir():
        raise OutputError(f"{output_dir} is a file; output_dir must be a folder")
    present = _entries(output_dir)
    if present and not (output_dir / MARKER).is_file():
        raise OutputError(
            f"{output_dir} is not empty and was not written by lowrank ({_listed(present)}), so neither resume=true "
            "nor overwrite=true applies; choose another output_dir, or empty it yourself"
        )


def _take(output_dir: Path) -> FileLock:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output_dir / LOCK, timeout=0, thread_local=False)
        lock.acquire()
    except Timeout:
        owner = _read_marker(output_dir)
        raise OutputError(
            f"{output_dir} is in use by process {owner.get('pid', 'unknown')} on {owner.get('host', 'this machine')}, "
            f"started {owner.get('started', 'at an unknown time')}; let it end or stop it, or choose another output_dir"
        ) from None
    except OSError as error:
        raise OutputError(f"{output_dir}: cannot be written to ({error})") from error
    return lock


def _where_to_resume(output_dir: Path) -> tuple[Path | None, list[str]]:
    root = output_dir / CHECKPOINTS
    checkpoint, found = latest_checkpoint(root), list_checkpoints(root)
    if checkpoint is not None:
        newer = found[found.index(checkpoint) + 1 :]
        return checkpoint, [f"{path} is damaged; resuming from {checkpoint.name} instead" for path in newer]
    what = [f"{path.relative_to(output_dir)} is damaged" for path in found]
    what += [f"{path.relative_to(output_dir)} would be replaced" for path in _trained(output_dir)]
    heading = f"{output_dir}: resume=true, but there is no checkpoint to resume from; overwrite=true starts anew"
    raise_all(OutputError, heading, what)
    return None, [f"{output_dir} has no checkpoint yet: starting from the beginning"]


def _trained(output_dir: Path) -> list[Path]:
    jobs = [output_dir / name for name in sorted(_owned(output_dir))]
    return [job / name for job in jobs for name in JOB_FOLDERS if (job / name).is_dir()]


def _refuse_to_delete_foreign(output_dir: Path, owned: set[str]) -> None:
    """OutputError if there is anything in the folder that a run did not write."""
    foreign = [output_dir / name for name in _entries(output_dir) if name not in {*RUN_FILES, *owned}]
    foreign += [path for path in _inside(output_dir / CHECKPOINTS) if path not in list_checkpoints(path.parent)]
    for name in owned - set(RUN_FILES):
        foreign += [path for path in _inside(output_dir / name) if path.name not in JOB_FOLDERS]
    heading = f"{output_dir}: overwrite=true deletes only what lowrank wrote; move away or delete yourself"
    raise_all(OutputError, heading, [str(path.relative_to(output_dir)) for path in foreign])


def _entries(folder: Path) -> list[str]:
    """Names in a folder, but for the marker, the lock, a request to stop, and temporaries."""
    if not folder.is_dir():
        return []
    return sorted(name for name in os.listdir(folder) if name not in (MARKER, LOCK, STOP) and not is_leftover(name))


def _inside(folder: Path) -> list[Path]:
    return [folder / name for name in _entries(folder)]


def _folders(output_dir: Path) -> list[Path]:
    """Where replacements may have been interrupted."""
    return [output_dir, *(path for path in _inside(output_dir) if path.is_dir())]


def _owned(output_dir: Path) -> list[str]:
    """Names at the top that belong to the run, besides RUN_FILES: its jobs."""
    return list(_read_marker(output_dir).get("owned", ()))


def _mark(output_dir: Path, owned: Iterable[str]) -> None:
    marker = {
        "owned": sorted(owned),
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_text(output_dir / MARKER, json.dumps(marker, indent=1) + "\n")


def _read_marker(output_dir: Path) -> dict[str, Any]:
    path = output_dir / MARKER
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{path}: cannot be read ({error}); choose another output_dir") from error
    return marker if isinstance(marker, dict) else {}


def _listed(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
