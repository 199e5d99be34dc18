"""What a file is by what stands in it: names are only believed where the content does not say otherwise."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path

from lowrank.data.formats.columns import COLUMNS
from lowrank.data.sources.places import shown
from lowrank.errors import DataError

HEAD = 64 << 10

PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
"""How compressed files begin."""
_ARROW = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\xff\xff\xff\xff": ".arrow"}
_NO_DATA = {
    b"%PDF": "a PDF document",
    b"\x89PNG": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"GIF8": "a picture (GIF)",
    b"SQLite format 3": "an SQLite database",
    b"GGUF": "a model (GGUF)",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"\x7fELF": "a program",
    b"\x80\x02": "a pickle, which could run code",
    b"\x80\x03": "a pickle, which could run code",
    b"\x80\x04": "a pickle, which could run code",
    b"\x80\x05": "a pickle, which could run code",
}
_HTML = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_TITLE = re.compile(rb"<title>\s*([^<]{1,80})|<body[^>]*>\s*(?:<[^>]*>\s*)*([^<]{1,80})", re.IGNORECASE)
_OFFICE = (b"[Content_Types].xml", b"_rels/.rels", b"mimetypeapplication/vnd.oasis")
_WAY_OUT = "save its rows as JSON lines, CSV or parquet"


def packed_as(head: bytes) -> str | None:
    """Which compression a file that begins like this has."""
    return next((kind for mark, kind in PACKED.items() if head.startswith(mark)), None)


def suffix_by_content(path: Path, head: bytes) -> str:
    """The usual end of the name of files that begin with `head`; "" where that could be several or none.

    Raises DataError for what holds no rows, and says what it is.
    """
    name = shown(path)
    if not head:
        raise DataError(f"{name} is empty: it has no rows, not even a byte; was it written or downloaded to its end?")
    if any(mark in head[:200] for mark in _OFFICE) and head.startswith(b"PK"):
        raise DataError(f"{name}: a spreadsheet or document of an office program; save the table as CSV (UTF-8)")
    for mark, suffix in _ARROW.items():
        if head.startswith(mark):
            return suffix
    found = next((what for mark, what in _NO_DATA.items() if head.startswith(mark)), None)
    if head[257:262] == b"ustar":
        found = "a tar archive; unpack it and name the folder"
    if len(head) > 9 and head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 30:
        found = "tensors (safetensors)"
    if found:
        raise DataError(f"{name}: {found}, no dataset; {_WAY_OUT}")
    if head.startswith(b"version https://git-lfs.github.com/spec"):
        raise DataError(f"{name}: a pointer of Git LFS, not the data itself; fetch it with `git lfs pull`")
    if _HTML.match(head):
        raise DataError(f"{name}: a web page{_title(head)}, no data; download the file itself (its raw link)")
    return _suffix_of_text(head)


def _title(head: bytes) -> str:
    found = _TITLE.search(head)
    title = " ".join((found.group(1) or found.group(2)).decode(errors="replace").split()) if found else ""
    return f" ({shown(title)})" if title else ""


def _suffix_of_text(head: bytes) -> str:
    """`.jsonl` for what begins as JSON objects do, `.csv` for a header line of names we know, else ""."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if head.startswith(mark):
            text = head.removeprefix(codecs.BOM_UTF8).decode(encoding, errors="ignore")
            break
    else:
        text = head.decode("utf-8", errors="ignore")
    text = text.lstrip()
    if re.match(r'\{\s*("|\})|\[\s*\{', text) and not _templated(text):
        return ".jsonl"
    line = text.split("\n", 1)[0]
    cells = {cell.strip().strip('"').lower() for cell in re.split(r"[,;\t|]", line)}
    known = {name for names in COLUMNS.values() for name in names}
    return ".csv" if len(cells) > 1 and cells & known else ""


def _templated(text: str) -> bool:
    """Whether the first line only looks like JSON: it ends, and is none."""
    line, ended, _ = text.partition("\n")
    if not ended or line.strip() in ("{", "[") or line.lstrip().startswith("["):
        return False
    try:
        json.loads(line)
    except ValueError:
        return not line.rstrip().endswith((",", "{", "["))
    except RecursionError:
        return False
    return False
