"""What an export is compared on where the data of a run is not at hand."""

from __future__ import annotations

import numpy as np

from lowrank.export.held_out import HeldOut
from lowrank.export.verify import _answered


def test_a_question_without_an_answer_is_compared_itself() -> None:
    """A base that says nothing would otherwise have a perplexity of nothing, which is NaN and equals nothing."""
    prompts = (np.arange(5), np.arange(3))
    empty = tuple(np.zeros(len(prompt), bool) for prompt in prompts)
    held_out = _answered(HeldOut(prompts, empty, prompts, "questions"), [(7, 8), ()])
    assert [document.tolist() for document in held_out.documents] == [[0, 1, 2, 3, 4, 7, 8], [0, 1, 2]]
    assert [np.flatnonzero(mask).tolist() for mask in held_out.compared] == [[4, 5], [0, 1, 2]]
