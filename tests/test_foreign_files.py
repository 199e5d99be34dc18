"""JSON of strangers is measured before anything is made of it."""

from __future__ import annotations

import json
import resource

import pytest

from lowrank.errors import ModelError, first_line
from lowrank.foreign_files import DEEPEST_JSON, find_object, parse_json


def test_brackets_in_strings_do_not_count() -> None:
    value = {"a[[{": '[["\\[[{' * 200, "b": [1, {"c": []}], "\\": "\\\\"}
    assert parse_json(json.dumps(value), "x.json") == value
    assert parse_json('{"a":' + "[" * (DEEPEST_JSON - 1) + "]" * (DEEPEST_JSON - 1) + "}", "x.json")


@pytest.mark.parametrize("text", ['{"a":' + "[" * 2_000_000, '{"a":' * 101 + "1" + "}" * 101, b'{"a":' + b"[" * 200])
def test_deep_json_is_refused_before_it_is_parsed(text: str | bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(ModelError, match=r"^x\.json: cannot be read as JSON \(nested more than 100 deep\)$"):
        parse_json(text, "x.json")


def test_wide_json_is_refused_before_it_is_parsed() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match="more than 8,000,000 values"):
        parse_json('{"a":[' + "{}," * 9_000_000 + "1]}", "x.json")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize("line", ["", b"\n", '{"torn', "[1]", "7", "1" * 10_000, "[" * 100_000, b"\xff"])
def test_a_line_that_is_no_object_is_none(line: str | bytes) -> None:
    assert find_object(line) is None


def test_a_line_that_is_an_object() -> None:
    assert find_object(b'{"a": [1]}\n') == {"a": [1]}


@pytest.mark.parametrize(
    ("message", "shown"), [("", "OSError"), (" \n  no such thing\nmore", "no such thing"), ("x" * 900, "x" * 200)]
)
def test_the_first_line_that_a_library_says(message: str, shown: str) -> None:
    assert first_line(OSError(message)) == shown
