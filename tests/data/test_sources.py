"""Reading files as people have them: their kinds, encodings, and what is broken in them."""

from __future__ import annotations

import csv
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from lowrank.data.config import SourceConfig
from lowrank.data.sources.rows import Row, read_rows
from lowrank.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"instruction": f"Frage {n}: 加法？", "input": "", "output": f"antwort {n} 🙂"} for n in range(7)
]


def read(path: Path | str, **settings: Any) -> list[Row]:
    call = {name: settings.pop(name) for name in ("seed", "streaming", "max_samples", "root") if name in settings}
    return list(read_rows(SourceConfig(path=str(path), **settings), **{"seed": 0, **call}))


def write_lines(path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)


def write_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def write_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


WRITERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "array": ("x.json", lambda path: path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")),
    "array on one line": ("x.json", lambda path: path.write_text(json.dumps(ROWS, ensure_ascii=False), "utf-8")),
    "array called jsonl": ("x.jsonl", lambda path: path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")),
    "wrapped": ("x.json", lambda path: path.write_text(json.dumps({"data": ROWS, "version": 1}), encoding="utf-8")),
    "wrapped behind": ("x.json", lambda path: path.write_text(json.dumps({"v": 1, "data": ROWS}), encoding="utf-8")),
    "lines": ("x.jsonl", write_lines),
    "lines called json": ("x.json", write_lines),
    "csv": ("x.csv", write_csv),
    "parquet": ("x.parquet", lambda path: pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)),
    "arrow stream": ("x.arrow", write_arrow_stream),
    "arrow file": ("x.arrow", write_arrow_file),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_rows(kind: str, streaming: bool, tmp_path: Path) -> None:
    name, write = WRITERS[kind]
    write(tmp_path / name)
    rows = read(tmp_path / name, streaming=streaming)
    assert [row.values for row in rows] == ROWS
    assert [row.number for row in rows] == list(range(1, 8))
    assert {row.place for row in rows} == {name}


def test_txt_gives_lines_with_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("eins\n\n zwei \n", encoding="utf-8")
    assert [(row.number, row.values) for row in read(tmp_path / "x.txt")] == [
        (1, {"text": "eins"}),
        (3, {"text": " zwei "}),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_encodings(encoding: str, name: str, tmp_path: Path) -> None:
    rows = [{"instruction": "识别并解释", "output": "细胞理论是生物科学的一个理论"}] * 3
    texts = {
        "x.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "x.json": json.dumps(rows, ensure_ascii=False),
        "x.csv": "instruction,output\n" + "识别并解释,细胞理论是生物科学的一个理论\n" * 3,
    }
    (tmp_path / name).write_bytes(texts[name].encode(encoding))
    notes: list[str] = []
    source = SourceConfig(path=str(tmp_path / name))
    assert [row.values for row in read_rows(source, seed=0, note=notes.append)] == rows
    assert [encoding.upper() in note for note in notes] == ([] if encoding.startswith("utf-8") else [True])


def test_latin1_is_refused_with_the_offset_and_not_taken_for_chinese(tmp_path: Path) -> None:
    text = '{"text": "' + "café très déjà vu, " * 5 + '"}\n'
    (tmp_path / "x.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=rf"byte offset {text.index('é')}\)"):
        read(tmp_path / "x.jsonl")


def test_bad_byte_far_into_a_file_has_its_offset(tmp_path: Path) -> None:
    good = "ä" * (1 << 20)  # two bytes each: the bad byte is in the third chunk
    (tmp_path / "x.txt").write_bytes(good.encode() + b"\xff")
    with pytest.raises(DataError, match=f"broken UTF-8: the byte at offset {2 << 20} "):
        read(tmp_path / "x.txt")
    (tmp_path / "x.txt").write_bytes("细胞理论".encode("gb18030") + b"\xff\xff")
    with pytest.raises(DataError, match="neither UTF-8"):
        read(tmp_path / "x.txt")


def test_utf16_without_mark_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes('{"a": 1}'.encode("utf-16-le"))
    with pytest.raises(DataError, match="UTF-16 without"):
        read(tmp_path / "x.jsonl")


BROKEN = {
    "missing comma": ('[\n {"a": 1}\n {"a": 2}\n]', 3, 2, "comma"),
    "trailing comma": ('[\n {"a": 1},\n]', 2, 10, "remove the comma"),
    "single quotes": ("[\n {'a': 1}\n]", 2, 3, "double quotes"),
    "cut off": ('[\n {"a": 1},\n {"a": "abc', 3, 8, "cut off"),
    "line break in text": ('[\n {"a": "x\ny"}\n]', 2, 10, "line break"),
    "python constants": ('[\n {"a": None}\n]', 2, 8, "null, true and false"),
    "comma in object": ('[\n {"a": 1,}\n]', 2, None, "comma"),
    "more behind": ('[{"a": 1}] x', 1, 12, "between them"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_json_says_where_and_what_to_do(kind: str, tmp_path: Path) -> None:
    text, line, column, hint = BROKEN[kind]
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    where = rf"x\.json: broken JSON in line {line}, column {column or r'[0-9]+'}:"
    with pytest.raises(DataError, match=where) as caught:
        read(tmp_path / "x.json")
    assert hint in str(caught.value)


def test_place_of_a_mistake_is_right_deep_in_a_large_array(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "x" * 997, "n": n}) for n in range(3000)]  # several chunks
    lines[2500] = lines[2500].replace('"n"', "'n'")
    (tmp_path / "x.json").write_text("[\n" + ",\n".join(lines) + "\n]", encoding="utf-8")
    with pytest.raises(DataError, match=rf"line 2502, column {lines[2500].index(chr(39)) + 1}:"):
        read(tmp_path / "x.json")


def test_a_broken_line_is_that_line_alone(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": 2\n\n[1]\n{"a": 4}\n', encoding="utf-8")
    rows = read(tmp_path / "x.jsonl")
    assert [(row.number, row.values) for row in rows] == [(1, {"a": 1}), (2, {}), (4, {}), (5, {"a": 4})]
    assert (rows[1].problem or "").startswith("broken JSON: column 8:")
    assert (rows[2].problem or "").startswith("not an object: the row is a list")


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv", "x.txt"])
def test_a_file_is_never_in_memory_as_a_whole(name: str, tmp_path: Path) -> None:
    texts = (f"{number} " + "y" * 2000 for number in range(10_000))  # 20 MB
    writers: dict[str, Callable[[], str]] = {
        "x.json": lambda: json.dumps([{"text": text} for text in texts]),
        "x.jsonl": lambda: "".join(f'{{"text": "{text}"}}\n' for text in texts),
        "x.csv": lambda: "text\n" + "".join(f"{text}\n" for text in texts),
        "x.txt": lambda: "".join(f"{text}\n" for text in texts),
    }
    (tmp_path / name).write_text(writers[name](), encoding="utf-8")
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_rows(SourceConfig(path=str(tmp_path / name)), seed=0, streaming=True))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 10_000
    assert peak < 8 << 20


def test_csv_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('a,b\n1,2\n3\n"4\n4",5\n', encoding="utf-8")
    rows = read(path)
    assert [row.values for row in rows] == [{"a": "1", "b": "2"}, {}, {"a": "4\n4", "b": "5"}]
    assert rows[1].problem == "wrong number of cells: 1, while the header has 2"
    path.write_text('a,b\n1,"x"y\n', encoding="utf-8")
    with pytest.raises(DataError, match="broken CSV in line 2"):
        read(path)
    path.write_text("a,a\n1,2\n", encoding="utf-8")
    with pytest.raises(DataError, match="names 'a' twice"):
        read(path)
    path.write_text("a,b\n" + "x" * 200_000 + ",2\n", encoding="utf-8")  # over the csv module's own limit
    assert len(read(path)[0].values["a"]) == 200_000


def test_max_samples_is_drawn_by_the_seed_in_order(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(100)), encoding="utf-8")
    first = [row.number for row in read(tmp_path / "x.jsonl", max_samples=10)]
    assert first == sorted(first)
    assert first == [row.number for row in read(tmp_path / "x.jsonl", max_samples=10)]
    assert first != [row.number for row in read(tmp_path / "x.jsonl", max_samples=10, seed=1)]
    assert first != list(range(1, 11))
    assert [row.number for row in read(tmp_path / "x.jsonl", max_samples=10, streaming=True)] == list(range(1, 11))
    own = list(read_rows(SourceConfig(path=str(tmp_path / "x.jsonl"), max_samples=3), seed=0, max_samples=10))
    assert len(own) == 3


def test_placeholders_are_replaced_everywhere(tmp_path: Path) -> None:
    row = {"output": "I am {{name}} by {{author}}", "messages": [{"content": "{{name}}?"}]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    rows = read(tmp_path / "x.jsonl", replace={"{{name}}": "Ada", "{{author}}": "{{name}}"})
    assert rows[0].values == {"output": "I am Ada by {{name}}", "messages": [{"content": "Ada?"}]}


def test_folder_takes_data_files_of_one_split(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/c.jsonl"):
        (tmp_path / "plain" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "plain" / name).write_text(json.dumps({"from": name}) + "\n", encoding="utf-8")
    (tmp_path / "plain" / "README.md").write_text("about", encoding="utf-8")
    notes: list[str] = []
    rows = list(read_rows(SourceConfig(path=str(tmp_path / "plain")), seed=0, note=notes.append))
    assert [row.values["from"] for row in rows] == ["a/c.jsonl", "b.jsonl"]
    assert notes == ["left out in plain: README.md"]

    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        pyarrow.parquet.write_table(
            pa.Table.from_pylist([{"split": split}]), tmp_path / f"hub/data/{split}-00000-of-00001.parquet"
        )
    assert [row.values["split"] for row in read(tmp_path / "hub")] == ["train"]
    assert [row.values["split"] for row in read(tmp_path / "hub", split="test")] == ["test"]
    with pytest.raises(DataError, match="split 'validation'"):
        read(tmp_path / "hub", split="validation")


def test_a_dataset_saved_by_datasets_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert [row.values for row in read(tmp_path / "saved")] == ROWS


def test_what_does_not_exist_is_said(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"no file or folder .*trian\.jsonl; did you mean 'train\.jsonl'"):
        read(tmp_path / "trian.jsonl")
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"'\.zip' cannot be read"):
        read(tmp_path / "x.zip")


def test_relative_paths_begin_at_the_root(tmp_path: Path) -> None:
    write_lines(tmp_path / "x.jsonl")
    assert len(read("x.jsonl", root=tmp_path)) == 7
