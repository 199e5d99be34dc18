"""`lowrank board` on the command line."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from lowrank.cli.warm import HEAVY
from tests.board.running import start_program
from tests.command_line import lowrank


def test_one_board_for_a_folder_and_what_is_wrong_is_said(tmp_path: Path) -> None:
    program = start_program(tmp_path)
    try:
        second = lowrank("board", str(tmp_path), "--port", "0", "--json")
        assert second.returncode == 5
        assert "open on" in json.loads(second.stdout)["error"]["message"]
    finally:
        program.kill()
    open_to_all = lowrank("board", str(tmp_path), "--host", "0.0.0.0", "--json")
    assert open_to_all.returncode == 2
    assert "token" in json.loads(open_to_all.stdout)["error"]["message"]
    assert lowrank("board", str(tmp_path), "--models", str(tmp_path / "none"), "--json").returncode == 5


def test_the_key_stays_the_same_after_a_restart(tmp_path: Path) -> None:
    addresses = []
    for _ in range(2):
        program = start_program(tmp_path)
        addresses.append(program.address.partition("token=")[2])
        program.kill()
    assert addresses[0] == addresses[1]
    assert len(addresses[0]) > 20
    assert (tmp_path / ".board/token").stat().st_mode & 0o077 == 0


def test_what_the_warm_worker_imports_beforehand_is_there() -> None:
    assert not [name for name in HEAVY if find_spec(name) is None]
