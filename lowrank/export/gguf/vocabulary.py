"""A tokenizer's fields in a GGUF file, from tokenizer.json, with the special tokens and the chat template around it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import transformers
from tokenizers import Tokenizer

from lowrank.data.chat.template_sandbox import render_text
from lowrank.errors import ModelError
from lowrank.export.gguf import pretokenizers
from lowrank.export.gguf.corpus import PLAIN, TORTURE
from lowrank.export.gguf.pieces import Fields
from lowrank.foreign_files import read_json
from lowrank.models.loading.quiet import quiet_transformers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""GGUF's kinds of token."""

STOPS_BY_NAME = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<turn|>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_turn|>", "</s>",
    "<end_of_utterance>", "<eos>",
}  # fmt: skip
"""Tokens at which llama.cpp ends an answer whatever the file says (llama-vocab.cpp)."""


@dataclass(frozen=True)
class Vocabulary:
    """`fields`: keys of the GGUF header, whole. `notes`: what the user should know."""

    fields: Fields
    notes: list[str] = field(default_factory=list)


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The tokenizer of a checkpoint whose embedding has `size` rows. Raises ModelError: none, or not to be told."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{folder}: no tokenizer.json; save the tokenizer with transformers first "
            "(AutoTokenizer.from_pretrained(folder).save_pretrained(folder))"
        )
    described = read_json(path)
    with quiet_transformers():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    kind = described["model"]["type"]
    if kind != "BPE":
        raise ModelError(
            f"{path}: a {kind} tokenizer; lowrank writes BPE tokenizers to GGUF (byte-level and SentencePiece)"
        )
    tokens, kinds = _tokens(described, size, path)
    notes: list[str] = []
    if _is_byte_level(described):
        fields = _byte_level(described, notes)
    else:
        fields = _sentencepiece(described, kinds, tokens, path)
    fields |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    fields |= _special(folder, tokenizer, Tokenizer.from_str(json.dumps(described)), notes)
    return Vocabulary(fields, notes)


def _is_byte_level(described: dict[str, Any]) -> bool:
    steps = described.get("pre_tokenizer") or {}
    return any(step.get("type") == "ByteLevel" for step in [steps, *steps.get("pretokenizers", [])])


def _tokens(described: dict[str, Any], size: int, path: Path) -> tuple[list[str], list[int]]:
    """The list of tokens and their kinds, as long as the embedding."""
    vocabulary = described["model"]["vocab"]
    highest = max([*vocabulary.values(), *(token["id"] for token in described["added_tokens"])])
    if highest >= size:
        raise ModelError(
            f"{path}: the tokenizer has tokens up to number {highest}, the model's embedding only {size} rows; "
            "they do not belong together, or the embedding was not resized after adding tokens"
        )
    tokens = [f"[PAD{index}]" for index in range(size)]
    kinds = [UNUSED] * size
    for text, index in vocabulary.items():
        tokens[index], kinds[index] = text, NORMAL
    for token in described["added_tokens"]:
        text = token["content"]
        control = token["special"] or _looks_special(text)
        tokens[token["id"]] = text if control else text.replace("▁", " ")
        kinds[token["id"]] = CONTROL if control else USER_DEFINED
    return tokens, kinds


def _looks_special(text: str) -> bool:
    """Some models forget to call their control tokens special; upstream's rule."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _merges(described: dict[str, Any]) -> list[str]:
    """Pairs as `left right`; a space within one is written as Ġ, as upstream does."""
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in described["model"]["merges"]]
    return [" ".join(side.replace(" ", "Ġ") for side in pair) for pair in pairs]


def _byte_level(described: dict[str, Any], notes: list[str]) -> Fields:
    choice = pretokenizers.choose(described, [*PLAIN, *TORTURE])
    if choice.note:
        notes.append(choice.note)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": choice.name,
        "tokenizer.ggml.merges": _merges(described),
    }


def _sentencepiece(described: dict[str, Any], kinds: list[int], tokens: list[str], path: Path) -> Fields:
    """llama.cpp joins whichever neighbors give the token of the highest score; a token's score is minus its number.

    That is the order in which SentencePiece learned them, and in which transformers wrote the merges.
    """
    model = described["model"]
    if not model.get("byte_fallback"):
        raise ModelError(
            f"{path}: a BPE tokenizer that is neither byte-level nor falls back to bytes; llama.cpp has none"
        )
    unknown = model["vocab"].get(model.get("unk_token"))
    for index, text in enumerate(tokens):
        if kinds[index] != UNUSED and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kinds[index] = BYTE
    own: Fields = {}
    if unknown is not None:
        kinds[unknown] = UNKNOWN
        own["tokenizer.ggml.unknown_token_id"] = unknown
    scores = [-float(index) if kind in (NORMAL, UNKNOWN, BYTE) else -1000.0 for index, kind in enumerate(kinds)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": _adds_space(described),
        **own,
    }


def _adds_space(described: dict[str, Any]) -> bool:
    core = Tokenizer.from_str(json.dumps({**described, "added_tokens": [], "post_processor": None}))
    pieces = core.encode("a", add_special_tokens=False).tokens
    return bool(pieces) and pieces[0].startswith("▁")


def _special(folder: Path, tokenizer: Any, core: Tokenizer, notes: list[str]) -> Fields:
    fields: Fields = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        index = getattr(tokenizer, f"{ours}_token_id")
        if index is not None:
            fields[f"tokenizer.ggml.{theirs}_token_id"] = index
    bare = core.encode("a", add_special_tokens=False).ids
    around = core.encode("a", add_special_tokens=True).ids
    place = next((i for i in range(len(around)) if around[i : i + len(bare)] == bare), 0)
    before, after = around[:place], around[place + len(bare) :]
    fields["tokenizer.ggml.add_bos_token"] = before == [tokenizer.bos_token_id]
    fields["tokenizer.ggml.add_eos_token"] = after == [tokenizer.eos_token_id]
    adds = [bool(fields[f"tokenizer.ggml.add_{end}_token"]) for end in ("bos", "eos")]
    for added, known, side in zip((before, after), adds, ("before", "after")):
        if added and not known:
            names = " ".join(str(core.id_to_token(index)) for index in added)
            notes.append(
                f"the tokenizer puts {names} {side} plain text, which a GGUF file cannot say; chats are not affected"
            )
    stops = _stops(folder, tokenizer, core)
    if tokenizer.eos_token_id is None and stops:
        fields["tokenizer.ggml.eos_token_id"] = stops[0]
    if "tokenizer.ggml.eos_token_id" not in fields:
        notes.append("neither the tokenizer nor the generation settings name a token that ends an answer")
    others = [index for index in stops if index != fields.get("tokenizer.ggml.eos_token_id")]
    unnamed = [index for index in others if core.id_to_token(index) not in STOPS_BY_NAME]
    if others:
        fields["tokenizer.ggml.eot_token_id"] = (unnamed or others)[0]
    if len(unnamed) > 1:
        names = ", ".join(str(core.id_to_token(index)) for index in unnamed[1:])
        notes.append(
            f"a GGUF file names two tokens that end an answer; give these to the server as stop words: {names}"
        )
    if tokenizer.chat_template:
        fields["tokenizer.chat_template"] = _one_template(tokenizer.chat_template)
    return fields


def _one_template(template: Any) -> str:
    return template if isinstance(template, str) else template.get("default", next(iter(template.values())))


def _stops(folder: Path, tokenizer: Any, core: Tokenizer) -> list[int]:
    """Tokens that end an answer: what the template writes after one, then what the generation settings say."""
    found = []
    end = _end_of_turn(tokenizer, core)
    if end is not None:
        found.append(end)
    path = folder / "generation_config.json"
    if path.is_file():
        eos_ids = read_json(path).get("eos_token_id")
        found += eos_ids if isinstance(eos_ids, list) else [eos_ids] if eos_ids is not None else []
    return list(dict.fromkeys(index for index in found if core.id_to_token(index) is not None))


def _end_of_turn(tokenizer: Any, core: Tokenizer) -> int | None:
    """The special token that the chat template puts right after an answer."""
    if not tokenizer.chat_template:
        return None
    answer = "xyzzy"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        text = render_text(tokenizer, messages)
    except (jinja2.TemplateError, TypeError, ValueError):
        return None
    after = text.rpartition(answer)[2].lstrip()
    special = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
    starts = [token for token in special if after.startswith(token)]
    return special[max(starts, key=len)] if starts else None
