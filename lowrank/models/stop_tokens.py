"""Stop tokens that a model's own files declare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from lowrank.foreign_files import read_json

ATTRIBUTE = "declared_stop_tokens"
"""Of a tokenizer: ids that the model's files declare, beside its EOS."""


def declared_stop_tokens(path: str, revision: str | None = None) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json, else of config.json: one id or a list (Llama 3.1's `<|eom_id|>`,
    gpt-oss' `<|call|>`). Empty where the files say nothing that can be used."""
    for file in ("generation_config.json", "config.json"):
        content = _read(path, file, revision)
        given = content.get("eos_token_id")
        if given is None and isinstance(content.get("text_config"), dict):  # of a model with towers
            given = content["text_config"].get("eos_token_id")
        known = given if isinstance(given, list) else [given]
        ends = tuple(each for each in known if isinstance(each, int) and not isinstance(each, bool) and each >= 0)
        if ends:
            return ends
    return ()


def _read(path: str, file: str, revision: str | None) -> dict[str, Any]:
    try:
        place = cached_file(path, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        return read_json(Path(place)) if place else {}
    except (OSError, ValueError):
        return {}
