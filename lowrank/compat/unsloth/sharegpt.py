"""Unsloth's functions that turn rows into conversations, and conversations of other keys into the usual ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.errors import ConfigError, DataError, did_you_mean

_SYSTEM, _USER, _ASSISTANT = ("system",), ("user", "human", "input"), ("gpt", "assistant", "output")


def standardize_data_formats(
    dataset: Any,
    tokenizer: Any = None,
    aliases_for_system: Sequence[str] = _SYSTEM,
    aliases_for_user: Sequence[str] = _USER,
    aliases_for_assistant: Sequence[str] = _ASSISTANT,
    batch_size: int = 1000,
    num_proc: int | None = None,
    column: str = "conversations",
) -> Any:
    """Turns of other keys (`{"from", "value"}`, any two) as `{"role", "content"}`; those that have them stay.

    A dataset without that column stays as it is. DataError for a role that no list of aliases has, and for turns
    without text.
    """
    del tokenizer, batch_size
    first = next(iter(dataset), None)
    if first is None or column not in first:
        return dataset
    groups = {"system": aliases_for_system, "user": aliases_for_user, "assistant": aliases_for_assistant}
    roles = {alias: role for role, aliases in groups.items() for alias in aliases}
    keys = _keys(first[column])

    def turns(row: Mapping[str, Any]) -> dict[str, Any]:
        return {column: [_turn(each, keys, roles) for each in row[column]]}

    named = {"num_proc": num_proc, "desc": "standardize_data_formats"} if hasattr(dataset, "__len__") else {}
    return dataset.map(turns, **named)


standardize_sharegpt = standardize_data_formats


def _keys(turns: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(that of the role, that of the text). Of two unknown ones, the role's has fewer different values."""
    names = [name for name in (turns[0] if turns else {}) if any(each.get(name) is not None for each in turns)]
    for role, content in (("role", "content"), ("from", "value")):
        if role in names:
            return role, content if content in names else next((name for name in names if name != role), content)
    if len(names) != 2:
        return "role", "content"
    kinds = sorted(names, key=lambda name: len({str(each.get(name)) for each in turns}))
    return kinds[0], kinds[1]


def _turn(given: Mapping[str, Any], keys: tuple[str, str], roles: Mapping[str, str]) -> dict[str, str]:
    role = str(given.get(keys[0]) or given.get("role") or given.get("from"))
    if role not in roles:
        raise DataError(f"standardize_sharegpt: a turn of {role!r}{did_you_mean(role, roles)}")
    content = next((given[name] for name in (keys[1], "content", "value") if given.get(name) is not None), None)
    if not isinstance(content, str):
        raise DataError("standardize_sharegpt: a turn has neither content nor value")
    return {"role": roles[role], "content": content}


def to_sharegpt(
    dataset: Any,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Any:
    """Rows of columns as conversations of `{"from", "value"}`.

    `merged_prompt`: the question, with columns as {column}; what stands in [[...]] is left out where its first column
    is empty. `conversation_extension`: so many rows, drawn by `random_state`, become one conversation each.
    """
    columns = list(dataset.column_names)
    parts = re.split(r"(\[\[.+?\]\])", merged_prompt or "{" + merged_column_name + "}", flags=re.DOTALL)
    used = re.findall(r"\{(.+?)\}", "".join(parts))
    missing = [name for name in {*used, output_column_name} if name not in columns]
    if missing:
        raise ConfigError(f"to_sharegpt: no column {', '.join(sorted(missing))}; there are {', '.join(columns)}")

    def conversation(row: Mapping[str, Any]) -> dict[str, Any]:
        question = "".join(_filled(part, row) for part in parts)
        answer = row[output_column_name]
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": str(answer)}]}

    dataset = dataset.map(conversation, remove_columns=columns if remove_unused_columns else None, desc="to_sharegpt")
    if conversation_extension <= 1:
        return dataset
    others = [dataset.shuffle(seed=random_state + index) for index in range(1, conversation_extension)]

    def longer(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        more = [turn for each in others for turn in each[index]["conversations"]]
        return {"conversations": [*row["conversations"], *more]}

    return dataset.map(longer, with_indices=True, desc="to_sharegpt: longer conversations")


def _filled(part: str, row: Mapping[str, Any]) -> str:
    optional = part.startswith("[[") and part.endswith("]]")
    text = part[2:-2] if optional else part
    names = re.findall(r"\{(.+?)\}", text)
    if optional and (not names or row[names[0]] in (None, "")):
        return ""
    return re.sub(r"\{(.+?)\}", lambda found: "" if row[found[1]] is None else str(row[found[1]]), text)
