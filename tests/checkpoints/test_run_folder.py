"""Who may write in a run folder, and what becomes of what is in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.checkpoints.run_folder import LOCK, MARKER, open_run_folder
from lowrank.errors import OutputError
from tests.checkpoints.test_run_state import save

JOBS = ("r8", "r64")


def a_run(folder: Path, *, checkpoints: tuple[int, ...] = (10, 20), adapters: bool = True) -> None:
    """What a run leaves."""
    with open_run_folder(folder, jobs=JOBS) as run:
        (folder / "metrics.jsonl").write_text("{}\n")
        for step in checkpoints:
            save(run.checkpoints, step)
        for job in JOBS:
            (folder / job / "best").mkdir(parents=adapters, exist_ok=True) if adapters else (folder / job).mkdir()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "runs" / "first", jobs=JOBS) as run:
        assert run.checkpoint is None
        assert run.notes == ()
        assert sorted(os.listdir(run.path)) == [MARKER, LOCK]
    with open_run_folder(tmp_path / "runs" / "first", jobs=JOBS, resume=True) as run:  # it never wrote anything
        assert run.checkpoint is None
        assert "nothing to resume" in run.notes[0]


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    a_run(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError) as caught:
        open_run_folder(tmp_path, jobs=JOBS)
    for phrase in ("checkpoints", "metrics.jsonl", "r8", "resume=true", "overwrite=true"):
        assert phrase in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    open_run_folder(tmp_path, jobs=JOBS, resume=True).close()  # the refusal let go of the lock


def test_resume_finds_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    a_run(tmp_path, checkpoints=(10, 20, 30))
    (tmp_path / "checkpoints" / "step-000030" / "state.json").unlink()
    with open_run_folder(tmp_path, jobs=JOBS, resume=True) as run:
        assert run.checkpoint == tmp_path / "checkpoints" / "step-000020"
        assert "step-000030 is damaged; resuming from step-000020" in run.notes[0]


def test_resume_puts_right_what_a_crash_left(tmp_path: Path) -> None:
    a_run(tmp_path)
    os.rename(tmp_path / "r8" / "best", tmp_path / "r8" / ".best.replaced")
    (tmp_path / "checkpoints" / ".step-000030.0123456789ab.partial").mkdir()
    with open_run_folder(tmp_path, jobs=JOBS, resume=True) as run:
        assert len(run.notes) == 2
    assert (tmp_path / "r8" / "best").is_dir()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000010", "step-000020"]


def test_resume_without_checkpoints(tmp_path: Path) -> None:
    a_run(tmp_path / "early", checkpoints=(), adapters=False)
    with open_run_folder(tmp_path / "early", jobs=JOBS, resume=True) as run:
        assert run.checkpoint is None
        assert "no checkpoint yet: starting from the beginning" in run.notes[0]
    a_run(tmp_path / "pruned", checkpoints=())
    with pytest.raises(OutputError, match=r"r8/best would be replaced") as caught:
        open_run_folder(tmp_path / "pruned", jobs=JOBS, resume=True)
    assert "r64/best" in str(caught.value)


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path: Path) -> None:
    a_run(tmp_path)
    with open_run_folder(tmp_path, jobs=("other",), overwrite=True) as run:
        assert run.checkpoint is None
        assert (tmp_path / "metrics.jsonl").exists()  # until nothing can be refused any more
        run.clear()
        assert sorted(os.listdir(tmp_path)) == [MARKER, LOCK]


@pytest.mark.parametrize("stray", ["notes.txt", "r8/my_export.gguf", "checkpoints/keep", ".env"])
def test_overwrite_refuses_what_others_wrote(stray: str, tmp_path: Path) -> None:
    a_run(tmp_path)
    (tmp_path / stray).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=stray):
        open_run_folder(tmp_path, jobs=JOBS, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_of_someone_else_is_left_alone(flags: dict[str, bool], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"was not written by lowrank \(thesis.tex\)"):
        open_run_folder(tmp_path, jobs=JOBS, **flags)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(OutputError, match="is a file"):
        open_run_folder(tmp_path / "thesis.tex", jobs=JOBS, **flags)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written to"):
        open_run_folder(tmp_path / "file" / "run", jobs=JOBS)


HOLDER = """
import sys, time
from pathlib import Path
from lowrank.checkpoints.run_folder import open_run_folder
run = open_run_folder(Path(sys.argv[1]), jobs=("r8",))
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_cannot_write_and_a_dead_one_does_not_block(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(OutputError, match=f"in use by process {holder.pid} on "):
                open_run_folder(tmp_path, jobs=JOBS)
        holder.kill()
    open_run_folder(tmp_path, jobs=JOBS).close()


def test_one_process_cannot_open_a_folder_twice(tmp_path: Path) -> None:
    with open_run_folder(tmp_path, jobs=JOBS), pytest.raises(OutputError, match=f"process {os.getpid()}"):
        open_run_folder(tmp_path, jobs=JOBS)
