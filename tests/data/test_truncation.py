"""Records longer than max_length: cut, left out, refused, or in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lowrank.records import Message, Preference, Text
from lowrank.segments import PLAIN
from tests.data.renderers import TURNS, chat, only, renderer_of


def test_truncation_keeps_the_prompt_and_counts() -> None:
    whole = only(renderer_of("llama3").render(chat("a question", TURNS[5] * 10)))
    prompt = int(np.flatnonzero(whole.weight_L)[0])
    renderer = renderer_of("llama3", max_length=prompt + 7)
    rendering = renderer.render(chat("a question", TURNS[5] * 10))
    assert only(rendering).token_L.tolist() == whole.token_L[: prompt + 7].tolist()
    assert rendering.truncated_tokens == len(whole) - prompt - 7
    tight = renderer_of("llama3", max_length=prompt).render(chat("a question", TURNS[5] * 10))
    assert tight.segments == ()
    assert "its prompt alone fills that" in (tight.problem or "")


def test_a_pair_needs_both_answers() -> None:
    record = Preference(chat("a"), Message("assistant", "good " * 30), Message("assistant", "bad"))
    lengths = [len(segment) for segment in renderer_of("llama3").render(record).segments]
    cut = renderer_of("llama3", max_length=lengths[0] - 5).render(record)
    assert [len(segment) for segment in cut.segments] == [lengths[0] - 5, lengths[1]]
    assert cut.truncated_tokens == 5
    assert renderer_of("llama3", max_length=4).render(record).segments == ()


@pytest.mark.parametrize(("policy", "refused"), [("drop", False), ("error", True)])
def test_too_long_rows_are_left_out_or_refused(policy: str, refused: bool) -> None:
    rendering = renderer_of("llama3", on_too_long=policy, max_length=20).render(chat("a", TURNS[5] * 10))
    assert rendering.segments == ()
    assert rendering.refused is refused
    assert "data.max_length is 20" in (rendering.problem or "")


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("record", [Text(TURNS[5] * 20), chat(TURNS[0], TURNS[5] * 10, TURNS[2], TURNS[3] * 9)])
def test_pieces_learn_every_learned_token_once(record: Any, adds_bos: bool) -> None:
    whole = only(renderer_of("llama3", adds_bos=adds_bos, max_length=10**6).render(record))
    for length in (2, 7, 50):
        rendering = renderer_of("llama3", adds_bos=adds_bos, max_length=length, on_too_long="split").render(record)
        pieces = rendering.segments
        assert all(len(piece) <= length and piece.weight_L[0] == 0 for piece in pieces)
        together = np.concatenate([piece.token_L[piece.weight_L > 0] for piece in pieces])
        assert together.tolist() == whole.token_L[whole.weight_L > 0].tolist()
        assert rendering.samples == tuple((piece,) for piece in pieces)
        assert {piece.role for piece in pieces} == {PLAIN}
