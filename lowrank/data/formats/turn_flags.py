"""Which turns are learned, in the spellings of the projects that data is written for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.data.formats.columns import RowProblem, describe, list_of

LOSS_FLAGS = (
    "weight", "loss", "train", "training", "trainable", "loss_weight", "loss_scale", "loss_mask", "step_loss_mask",
)  # fmt: skip
"""Keys of a turn: OpenAI's and Mistral's `weight`, ms-swift's `loss` and `loss_scale`, Axolotl's `train` and
`training`, verl's `trainable`, LLaMA-Factory's `loss_weight`, slime's `step_loss_mask`; a mask is 1 for what is
learned, as everywhere."""
ROW_FLAG = "loss_mask"
"""Column of 0 and 1 for each turn, or for each turn of the assistant."""
_FLAG_VALUES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def is_trained(item: Mapping[str, Any], number: int, *, is_answer: bool) -> bool:
    """Whether a turn is learned. RowProblem for a flag that is neither 0 nor 1, and for flags that contradict.

    A flag that asks for a turn to be learned which is no answer (`is_answer` false) stays unread, so it is named.
    """
    described: dict[str, bool] = {}
    for name in LOSS_FLAGS:
        value = dict.get(item, name) if isinstance(item, dict) else item.get(name)
        if value is None:
            continue
        flag = _flag(value, f"turn {number}", name)
        if is_answer or not flag:
            item.get(name)
            described[name] = flag
    if len(set(described.values())) > 1:
        flags = ", ".join(f"{name} {int(flag)}" for name, flag in described.items())
        raise RowProblem(f"contradictory weights: turn {number} has {flags}")
    return all(described.values())


def flags_of_row(value: Any, is_answer: Sequence[bool]) -> list[bool]:
    """For each turn whether the row's column lets it be learned; what it says of turns that are no answers is nothing.

    RowProblem if the flags are as many as neither the turns nor the answers.
    """
    written = list_of(value, ROW_FLAG) if isinstance(value, (str, list, tuple)) else [value]
    flags = [_flag(each, "the row", ROW_FLAG) for each in written]
    answers = sum(is_answer)
    if len(flags) == 1:
        flags *= answers
    if len(flags) == len(is_answer):
        return flags
    if len(flags) != answers:
        raise RowProblem(
            f"unusable {ROW_FLAG}: {len(flags)} flags for {len(is_answer)} turns, {answers} of them answers"
        )
    of_answers = iter(flags)
    return [not answer or next(of_answers) for answer in is_answer]


def _flag(value: Any, where: str, name: str) -> bool:
    plain = _FLAG_VALUES.get(value.strip().lower(), value) if isinstance(value, str) else value
    if plain not in (0, 1):
        raise RowProblem(f"unusable {name}: {where} has {describe(value)}, expected 0 or 1")
    return bool(plain)
