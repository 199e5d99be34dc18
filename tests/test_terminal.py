"""No control code of a file, a model or a name reaches the terminal, and none that lacks a character breaks."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from lowrank.terminal import Console, printable, safe_streams, visible
from tests.command_line import lowrank

EVIL = "a\x1b]0;OWNED\x07\x1b[31m\x1b[2J\x9b2J\u202eb\r"


def test_codes_are_written_out_or_left_out() -> None:
    assert visible("a\x1b[2J\n\t中") == "a\\u001b[2J\n\t中"
    assert visible(EVIL).isprintable()
    assert printable(EVIL).isprintable()


def test_consoles_show_their_own_colors_and_nobody_elses() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=200)
    table = Table(title=EVIL)
    table.add_column(Text(EVIL, style="red"))
    table.add_row(EVIL)
    console.print(table, EVIL, markup=False)
    console.print(Text("ours", style="red"))
    text = out.getvalue()
    assert "\x1b[31m" in text  # rich's red
    for code in ("\x1b[31ma", "\x1b]0", "\x07", "\x1b[2J", "\x9b", "\u202e", "\r"):
        assert code not in text


def test_print_is_safe_within_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with safe_streams():
        print(EVIL)
        print(json.dumps({"x": EVIL}, ensure_ascii=False))
    plain, written = capsys.readouterr().out.splitlines()
    assert "\x1b]" not in plain
    assert json.loads(written) == {"x": EVIL}


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
def test_poor_terminals_get_numbers_and_no_traceback(tmp_path: Path, encoding: str) -> None:
    rows = [{"q\x1b[2J\x07": "é \U0001f642", "r": "中\x1b[31m\u202e"}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for arguments in (["data", str(tmp_path / "rows.jsonl")], ["data", str(tmp_path / "\U0001f642\x1b[2J.jsonl")]):
        done = lowrank(*arguments, PYTHONIOENCODING=encoding)
        assert "Traceback" not in done.stderr
        assert done.returncode in (2, 3)
        assert "\x1b" not in done.stdout + done.stderr
        assert done.stderr
