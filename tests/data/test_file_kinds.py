"""Files by their content, pipes, patterns, and paths at which nothing can be read: each in one sentence, in no time."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from lowrank.data.config import SourceConfig
from lowrank.data.sources import spooled
from lowrank.data.sources.rows import read_rows
from lowrank.errors import DataError

ROWS = [{"instruction": f"加 {n}", "output": f"= {n}"} for n in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def read(path: Path | str, notes: list[str] | None = None, **settings: Any) -> list[dict[str, Any]]:
    rows = list(
        read_rows(SourceConfig(path=str(path), **settings), seed=0, note=(notes if notes is not None else []).append)
    )
    assert not [row.problem for row in rows if row.problem]
    return [row.values for row in rows]


def parquet() -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), out)
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("inner/rows.jsonl", LINES)
    return out.getvalue()


CSV = "instruction;output\n" + "".join(f"{row['instruction']};{row['output']}\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", LINES.encode()),
        ("rows.jsonl", json.dumps(ROWS).encode()),
        ("rows.json", parquet()),
        ("rows.csv", parquet()),
        ("rows.csv", LINES.encode()),
        ("rows.txt", LINES.encode()),
        ("rows", LINES.encode()),
        ("rows", CSV.encode()),
        ("rows.parquet", LINES.encode()),
        ("rows.tsv", CSV.encode()),
        ("rows.json", CSV.encode()),
        ("rows.csv", CSV.encode("utf-16")),
        ("rows.csv", CSV.encode("utf-8-sig")),
        ("rows.csv", CSV.encode("gbk")),
        ("rows.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("rows.jsonl", gzip.compress(LINES.encode(), mtime=0)),
        ("rows.csv.bz2", bz2.compress(CSV.encode())),
        ("rows.json.xz", lzma.compress(json.dumps(ROWS).encode())),
        ("rows.zip", zipped()),
    ],
)
def test_the_content_says_what_a_file_is(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == ROWS
    if "." in name:
        assert read(tmp_path) == ROWS


def test_text_that_looks_like_rows_is_read_as_text_where_text_is_asked(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(LINES, encoding="utf-8")
    notes: list[str] = []
    assert read(tmp_path / "x.txt", notes) == ROWS
    assert notes == ["x.txt is read as jsonl, which it is by its content"]
    assert read(tmp_path / "x.txt", format="text")[0] == {"text": LINES.split("\n")[0]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", r"a web page \(404 Not Found\), no data"),
        ("x.jsonl", b"\n<html><head><title>Sign in\n</title>", r"a web page \(Sign in\)"),
        ("x.json", b"%PDF-1.7 ...", "a PDF document, no dataset"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS"),
        ("x.csv", b"PK\x03\x04" + b"\0" * 26 + b"[Content_Types].xml", "office program; save the table as CSV"),
        ("x.jsonl", b"\x80\x04\x95abc", "a pickle, which could run code"),
        ("x.parquet", b"PAR1 and no more", "broken parquet file"),
        ("x.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-10], "broken gzip file"),
        ("x.zip", b"PK\x03\x04 and no more", "broken zip file"),
        ("x.jsonl", b"", "is empty: it has no rows"),
        ("x.json", b"  \n ", "nothing but blanks"),
        ("x.jsonl", bytes(range(256)) * 4 + b"\0" * 200, "a binary file"),
        ("x.json", b"[" * 100_000, "nested too deeply"),
        ("x.json", b'[{"a": ' + b"1" * 5000 + b"}]", "broken JSON in line 1, column 2: .*4300 digits"),
        ("x.dat", b"just words", r"'\.dat' cannot be read, those ending in"),
    ],
)
def test_what_holds_no_rows_is_called_what_it_is(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        read(tmp_path / name)
    assert name in str(raised.value)


def test_a_row_with_a_zero_byte_or_too_deep_is_that_row_alone(tmp_path: Path) -> None:
    deep = '{"instruction": ' + "[" * 500 + "]" * 500 + "}"
    huge = '{"instruction": ' + "9" * 5000 + "}"
    (tmp_path / "x.jsonl").write_text("\n".join([LINES.strip(), '{"a": "b\0c"}', deep, huge]), encoding="utf-8")
    rows = list(read_rows(SourceConfig(path=str(tmp_path / "x.jsonl")), seed=0))
    assert [row.number for row in rows if not row.problem] == [1, 2, 3]
    assert [row.problem and row.problem.split(":")[0] for row in rows[3:]] == [
        "broken JSON",
        "nested too deeply",
        "broken JSON",
    ]
    assert "a zero byte stands inside a text" in (rows[3].problem or "")


def test_mistakes_in_what_was_unpacked_are_told_of_the_packed_file(tmp_path: Path) -> None:
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b'[{"a": 1},]'))
    with pytest.raises(DataError) as raised:
        read(tmp_path / "x.json.gz")
    assert str(raised.value).startswith(f"x.json in {tmp_path}/x.json.gz: broken JSON in line 1")


def test_bombs_do_not_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spooled, "_ALWAYS_UNPACKED", 1 << 20)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b" " * (8 << 20)))
    with pytest.raises(DataError, match=r"bytes unpack to more than"):
        read(tmp_path / "x.jsonl.gz")


def test_an_archive_of_several_files_is_left_to_the_person(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.jsonl", LINES)
        archive.writestr("b.jsonl", LINES)
    with pytest.raises(DataError, match=r"an archive of 2 files \(a\.jsonl, b\.jsonl\); unpack it"):
        read(tmp_path / "x.zip")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('sep=;\nq;a\n"x; y";1\n', [{"q": "x; y", "a": "1"}]),
        ('"sep=,"\r\nq,a\r\nx,1\r\n', [{"q": "x", "a": "1"}]),
        ('"instruction";"note (source, date)"\nhi;a\n', [{"instruction": "hi", "note (source, date)": "a"}]),
        ("instruction;note (a, b);output\nx, y;1;2\n", [{"instruction": "x, y", "note (a, b)": "1", "output": "2"}]),
        ("instruction;output\nhi, there;yes, you\n", [{"instruction": "hi, there", "output": "yes, you"}]),
        ("a\tb\n1,5\t2;3\n", [{"a": "1,5", "b": "2;3"}]),
        ("a|b\n1|2\n", [{"a": "1", "b": "2"}]),
        ('a,b\n"1\n2",";"\n', [{"a": "1\n2", "b": ";"}]),
        ("a;b;;\n1;2;;\n", [{"a": "1", "b": "2"}]),
        ("text\nhello\n", [{"text": "hello"}]),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marks_between_cells(text: str, expected: list[dict[str, str]], encoding: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(text.encode(encoding))
    assert read(tmp_path / "x.csv") == expected


def tools_of(*properties: str) -> list[dict[str, Any]]:
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in properties}}
    return [{"type": "function", "function": {"name": properties[0], "parameters": schema}}]


@pytest.mark.parametrize("by", ["pyarrow", "datasets", "arrow"])
def test_nulls_that_arrow_filled_in_are_nobodys_values(by: str, tmp_path: Path) -> None:
    rows = [
        {"tools": tools_of("city"), "calls": [{"arguments": {"city": "Oslo"}}], "text": None, "json": '{"a": null}'},
        {"tools": tools_of("zone", "unit"), "calls": [{"arguments": {"zone": "CET"}, "id": "1"}, {"arguments": {}}]},
    ]
    if by == "pyarrow":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    else:
        import datasets

        datasets.disable_progress_bars()
        dataset = datasets.Dataset.from_list(rows)
        if by == "datasets":
            dataset.to_parquet(str(tmp_path / "x.parquet"))
        else:
            dataset.save_to_disk(str(tmp_path))
    found = read(tmp_path)
    assert [row["tools"] for row in found] == [row["tools"] for row in rows]
    assert [row["calls"] for row in found] == [row["calls"] for row in rows]
    assert found[0]["json"] == '{"a": null}'


def test_patterns(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.txt", "below/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"of": name}) + "\n", encoding="utf-8")
    assert [row["of"] for row in read(tmp_path / "*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert [row["of"] for row in read(tmp_path / "**" / "*.jsonl")] == ["a.jsonl", "b.jsonl", "below/d.jsonl"]
    with pytest.raises(DataError, match="no file has such a name; a pattern is written as"):
        read(tmp_path / "*.parquet")
    (tmp_path / "odd[1].jsonl").write_text(json.dumps({"of": "odd"}) + "\n", encoding="utf-8")
    assert read(tmp_path / "odd[1].jsonl") == [{"of": "odd"}]


def loop(folder: Path) -> Path:
    (folder / "x.json").symlink_to("x.json")
    return folder / "x.json"


def dangling(folder: Path) -> Path:
    (folder / "x.json").symlink_to("gone.json")
    return folder / "x.json"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (loop, "a symbolic link that leads in a circle"),
        (dangling, r"no file or folder|a symbolic link to gone\.json, which is not there"),
        (lambda folder: folder / ("x" * 5000 + ".json"), "longer than the system allows"),
        (lambda folder: folder / "a\0b.json", "it has a zero byte in it"),
        (lambda folder: Path("/dev/null"), "a device, no file"),
        (lambda folder: folder / "x.json" / "y.json", "no file or folder"),
    ],
)
def test_paths_at_which_there_is_nothing(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read(make(tmp_path))


def test_a_pipe_is_read_once_and_may_be_read_again(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=lambda: (tmp_path / "pipe").write_text(LINES, encoding="utf-8")).start()
    assert read(tmp_path / "pipe") == ROWS
    assert read(tmp_path / "pipe") == ROWS


def test_a_pipe_that_nobody_writes_to_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spooled, "SILENCE", 0.1)
    os.mkfifo(tmp_path / "pipe")
    started = time.monotonic()
    with pytest.raises(DataError, match="nothing came through this pipe"):
        read(tmp_path / "pipe")
    assert time.monotonic() - started < 5


def test_a_hub_that_cannot_be_reached_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(DataError, match=r"cannot be loaded from the hub .*http://127\.0\.0\.1:9 cannot be reached"):
        read("nobody/nothing")
    assert "Retrying" not in capfd.readouterr().err
    assert time.monotonic() - started < 30
