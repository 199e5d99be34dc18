"""Paths of every command that are no files of ours: one short sentence, at once, whatever is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank import foreign_files
from lowrank.cli.main import main
from lowrank.config.read import read_file
from lowrank.data.sources import spooled
from lowrank.errors import ConfigError

COMMANDS = ("show", "plan", "train", "data", "report", "export", "predict", "chat")


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code in (2, 3, 4, 5)
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert 0 < len(text) < 1000
    return text


def arguments_for(command: str, path: str) -> list[str]:
    return [command, path, *(["--prompt", "x"] if command == "chat" else [])]


@pytest.mark.parametrize("command", COMMANDS)
def test_ten_thousand_characters(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    refusal(arguments_for(command, "a" * 10_000), capsys)


@pytest.mark.slow  # the server's imports
@pytest.mark.parametrize("path", ["a" * 10_000, "b" * 300])
def test_ten_thousand_characters_to_serve(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    refusal(["serve", path], capsys)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def zero_bytes(path: Path) -> None:
    path.write_bytes(b"\0" * 100)


def zero_byte_in_a_path(path: Path) -> None:
    path.write_text('{"model": {"path": "a\\u0000b"}, "data": {"train": ["c\\u0000"]}, "output_dir": "d"}')


def folder(path: Path) -> None:
    path.mkdir()


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def locked(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0)


@pytest.mark.parametrize("make", [pipe, loop, dangling, zero_bytes, zero_byte_in_a_path, folder, endless, locked])
@pytest.mark.parametrize(("command", "name"), [("show", "run.yaml"), ("plan", "run.json"), ("data", "rows.jsonl")])
def test_what_is_no_file(
    make: Callable[[Path], None],
    command: str,
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(foreign_files, "SILENCE", 0.2)
    monkeypatch.setattr(spooled, "SILENCE", 0.2)
    make(tmp_path / name)
    if make is locked and os.access(tmp_path / name, os.R_OK):
        pytest.skip("this user may read everything (root)")
    assert name in refusal([command, str(tmp_path / name)], capsys)


def test_settings_through_a_pipe_are_read(tmp_path: Path) -> None:
    """As `lowrank show <(make-settings)` gives them."""
    given, write = os.pipe()
    os.write(write, b"model: {path: somewhere}\n")
    os.close(write)
    assert read_file(Path(f"/dev/fd/{given}")) == {"model": {"path": "somewhere"}}
    os.close(given)
    (tmp_path / "large.yaml").write_bytes(b"a" * 10_000_001)
    with pytest.raises(ConfigError, match="is it a data file"):
        read_file(tmp_path / "large.yaml")
