"""Files and folders are there whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.checkpoints.atomic import current, is_leftover, new_file, new_folder, recover, remove, write_text

WRITER = """
import os, sys
from pathlib import Path
from lowrank.checkpoints.atomic import new_folder
path, crash_before = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
def counted(function):
    def wrapper(*arguments, **options):
        global calls
        calls += 1
        if calls == crash_before:
            os.kill(os.getpid(), 9)
        return function(*arguments, **options)
    return wrapper
for name in ("rename", "replace", "fsync", "unlink", "rmdir", "open"):
    setattr(os, name, counted(getattr(os, name)))
with new_folder(path) as partial:
    for name in ("a", "b"):
        (partial / name).write_text("new")
print(calls)
"""


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def make(folder: Path, text: str) -> None:
    with new_folder(folder) as partial:
        for name in ("a", "b"):
            (partial / name).write_text(text)


def test_a_folder_is_made_and_replaced(tmp_path: Path) -> None:
    make(tmp_path / "deep" / "best", "old")
    make(tmp_path / "deep" / "best", "new")
    assert contents(tmp_path / "deep" / "best") == {"a": "new", "b": "new"}
    assert os.listdir(tmp_path / "deep") == ["best"]


def test_an_exception_leaves_the_old(tmp_path: Path) -> None:
    make(tmp_path / "best", "old")
    write_text(tmp_path / "file", "old")
    with pytest.raises(OSError), new_folder(tmp_path / "best") as partial:
        (partial / "a").write_text("new") and (partial / "no such folder" / "b").write_text("new")
    with pytest.raises(OSError), new_file(tmp_path / "file") as partial:
        partial.write_text("new") and (partial / "b").write_text("a file is no folder")
    assert contents(tmp_path / "best") == {"a": "old", "b": "old"}
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["best", "file"]


def test_a_file_is_never_half_written(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with new_file(tmp_path / "file") as partial:
        partial.write_text("half")
        assert (tmp_path / "file").read_text() == "old"
        partial.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"


def test_killed_before_every_single_system_call(tmp_path: Path) -> None:
    """Not at random: at each call of a replacement in turn. Old or new is there, and recovery leaves nothing else."""
    script = tmp_path / "writer.py"
    script.write_text(WRITER)
    folder = tmp_path / "run"
    seen = []
    for crash_before in range(1, 60):
        for path in folder.iterdir() if folder.exists() else ():
            remove(path)
        make(folder / "best", "old")
        ended = subprocess.run(
            [sys.executable, script, folder / "best", str(crash_before)], capture_output=True, text=True, check=False
        )
        valid = contents(current(folder / "best"))
        assert valid in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"})
        recover(folder)
        assert contents(folder / "best") == valid
        assert os.listdir(folder) == ["best"]
        seen.append(valid["a"])
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert len(seen) > 8, "the replacement was killed at every call it makes"


def test_recovery_survives_being_killed_itself(tmp_path: Path) -> None:
    make(tmp_path / "best", "old")
    os.rename(tmp_path / "best", tmp_path / ".best.replaced")  # killed between the renames
    (tmp_path / ".best.0123456789ab.partial").mkdir()
    (tmp_path / ".other.0123456789ab.removed").mkdir()
    assert contents(current(tmp_path / "best")) == {"a": "old", "b": "old"}
    assert len(recover(tmp_path)) == 3
    assert contents(tmp_path / "best") == {"a": "old", "b": "old"}
    assert os.listdir(tmp_path) == ["best"]
    assert recover(tmp_path) == []
    assert recover(tmp_path / "nowhere") == []


def test_a_half_deleted_old_folder_never_comes_back(tmp_path: Path) -> None:
    make(tmp_path / "best", "new")
    (tmp_path / ".best.replaced").mkdir()  # killed while deleting the old one
    make(tmp_path / "best", "newer")
    assert contents(tmp_path / "best")["a"] == "newer"
    assert os.listdir(tmp_path) == ["best"]


def test_files_of_other_people_are_no_leftovers(tmp_path: Path) -> None:
    names = [".hidden", ".best.partial", "best.replaced", ".x.0123456789AB.partial", ".git", ".replaced"]
    for name in names:
        (tmp_path / name).mkdir()
    assert not any(map(is_leftover, names))
    assert recover(tmp_path) == []
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_remove(tmp_path: Path) -> None:
    make(tmp_path / "best", "x")
    write_text(tmp_path / "file", "x")
    (tmp_path / "kept").mkdir()
    os.symlink(tmp_path / "kept", tmp_path / "link")
    for name in ("best", "file", "link"):
        remove(tmp_path / name)
    assert os.listdir(tmp_path) == ["kept"]
