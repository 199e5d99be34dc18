"""Answers of an attempt that was interrupted are taken up again, whatever is in them."""

from __future__ import annotations

import json
from pathlib import Path

from lowrank.evaluate.predict import _key_of_question, _read_partial
from lowrank.evaluate.questions import Question
from lowrank.records import Conversation, Message

QUESTION = Question("row 1", Conversation((Message("user", "?"),)), Message("assistant", "!"))


def test_an_answer_with_line_separators_is_not_asked_for_again(tmp_path: Path) -> None:
    answer = "one\u2028two\x85three"
    line = {"digest": _key_of_question(QUESTION), "voice": "base", "answer": answer, "problem": None}
    strange = ["[" * 100_000, "7", '{"digest": []}', json.dumps(line, ensure_ascii=False)[:40]]
    (tmp_path / "x.jsonl").write_text("\n".join([json.dumps(line, ensure_ascii=False), *strange]), encoding="utf-8")
    (found,) = _read_partial(tmp_path / "x.jsonl", [QUESTION])
    assert found["base"].text == answer
