"""Tokens that an adapter brings: in its folder's own tokenizer, with rows of the embedding that it has trained.

Bases have rows to spare (151,936 of them for 151,665 tokens). Who adds tokens to the tokenizer and trains their rows
has resized nothing, so the base fits; but its tokenizer knows nothing of them, and would read each as pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from lowrank.checkpoints.atomic import current
from lowrank.checkpoints.peft_layout import AdapterOnDisk, read_adapter_header
from lowrank.errors import ModelError
from lowrank.foreign_files import read_json

TOKENIZER = "tokenizer.json"


def own_tokens(folder: Path, tokenizer: Any) -> dict[str, tuple[int, AddedToken]]:
    """Tokens in the adapter's folder that `tokenizer` lacks and whose rows it has trained, in order of their ids."""
    file = current(folder) / TOKENIZER
    if not file.is_file():
        return {}
    known = tokenizer.get_vocab()
    listed = read_json(file).get("added_tokens")
    unknown = [
        each for each in filter(_is_token, listed if isinstance(listed, list) else []) if each["content"] not in known
    ]
    if not unknown:
        return {}
    adapter = read_adapter_header(folder)
    found: dict[str, tuple[int, AddedToken]] = {}
    for each in sorted(unknown, key=lambda each: each["id"]):
        if _trains(adapter, each["id"]):
            marks = {
                name: bool(each.get(name)) for name in ("special", "lstrip", "rstrip", "single_word", "normalized")
            }
            found[each["content"]] = each["id"], AddedToken(each["content"], **marks)
    return found


def learn_tokens(tokenizer: Any, adapters: Mapping[str, Path]) -> list[str]:
    """Add the adapters' own tokens to the base's tokenizer, which all of them are asked with; sentences about it.

    `adapters`: their folders by name. ModelError where a token would not get the id whose row was trained: then
    the tokenizer is another one, or another adapter has put another token there.
    """
    notices = []
    for name, folder in adapters.items():
        own = own_tokens(folder, tokenizer)
        for content, (number, token) in own.items():
            if (next_id := len(tokenizer)) != number:
                raise ModelError(
                    f"{name}: its tokenizer ({current(folder) / TOKENIZER}) has the token {content[:80]!r} at "
                    f"{number}, and it would be {next_id} in the base's (with the tokens of adapters before it): it "
                    "belongs to another tokenizer, or goes by itself"
                )
            tokenizer.add_tokens([token])
        if own:
            shown = ", ".join(own)[:200]
            notices.append(f"{name} brings {len(own)} tokens of its own, which every model here reads as such: {shown}")
    return notices


def _is_token(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int


def _trains(adapter: AdapterOnDisk, token: int) -> bool:
    """Whether the row of a token is the adapter's: listed, or in an embedding of its own."""
    if token in adapter.config.trainable_token_indices:
        return True
    copies = (adapter.tensors.get(f"{name}.weight") for name in adapter.copies)
    whole = [*adapter.base_tensors.values(), *(each for each in copies if each is not None)]
    return any(each.ndim == 2 and each.shape[0] > token >= 0 for each in whole)
