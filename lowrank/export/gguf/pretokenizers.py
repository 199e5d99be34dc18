"""Which of llama.cpp's ways to cut text into words a byte-level BPE tokenizer uses.

llama.cpp has a fixed list of them, each a few regular expressions behind a name (`tokenizer.ggml.pre`), and a
wrong name gives other tokens for half of all texts without a word. Upstream's converter recognizes a tokenizer
by a hash of the token ids of one text, so it knows no newly trained one. Here the tokenizer's own cutting is
held against the list: first as written, then, for one that is not on it, by what it does to a corpus.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from lowrank.errors import ModelError

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENGLISH}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_ENGLISH}|{_LETTERS}|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


@dataclass(frozen=True)
class Preset:
    """One way of llama.cpp. `steps`: its cutting, as regular expressions applied one after the other."""

    name: str
    steps: tuple[str, ...]
    ignores_merges: bool = False
    """A word that is a token is taken whole, whatever the merges say."""


PRESETS = (
    Preset("llama-bpe", (_LLAMA3,), ignores_merges=True),
    Preset("dbrx", (_LLAMA3,)),
    Preset("glm4", (_LLAMA3,), ignores_merges=True),
    Preset("qwen2", (_QWEN2,)),
    Preset("qwen35", (_QWEN35,)),
    Preset("gpt-2", (_GPT2,)),
    Preset("smollm", (r"\p{N}", _GPT2)),
    Preset("gpt-4o", (_CASED % (f"{_ENGLISH}?", f"{_ENGLISH}?", "{1,3}"),)),
    Preset("tekken", (_CASED % ("", "", ""),), ignores_merges=True),
    Preset("deepseek-v3", (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
    Preset("deepseek-coder", ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    Preset("bloom", (_BLOOM,)),
    Preset("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
)

MOST_DIFFERENT = 0.02
"""Share of a corpus's tokens that may come out otherwise before a tokenizer is refused."""


@dataclass(frozen=True)
class Pretokenizer:
    """The name for the file, and what the user should know about it."""

    name: str
    note: str | None = None


def choose(described: dict[str, Any], corpus: Sequence[str]) -> Pretokenizer:
    """The preset of a tokenizer.json (parsed). Raises ModelError where none comes near it on `corpus`."""
    ignores = bool(described["model"].get("ignore_merges"))
    steps = _as_steps(described.get("pre_tokenizer"))
    for preset in PRESETS:
        if steps == preset.steps and ignores == preset.ignores_merges:
            return Pretokenizer(preset.name)
    return _nearest(described, corpus)


def _as_steps(described: dict[str, Any] | None) -> tuple[str, ...] | None:
    """The pre-tokenizer as regular expressions; None for what is not just that."""
    if described is None:
        return None
    kind = described["type"]
    if kind == "Sequence":
        inner = [_as_steps(step) for step in described["pretokenizers"]]
        return None if None in inner else tuple(step for steps in inner for step in steps or ())
    if kind == "ByteLevel" and not described.get("add_prefix_space"):
        return (_GPT2,) if described.get("use_regex", True) else ()
    if kind == "Digits" and described.get("individual_digits"):
        return (r"\p{N}",)
    if kind == "Split" and "Regex" in described["pattern"]:
        keeps_matches = described["behavior"] == "Isolated" and not described.get("invert")
        drops_the_rest = described["behavior"] == "Removed" and bool(described.get("invert"))  # these leave no rest
        return (described["pattern"]["Regex"],) if keeps_matches or drops_the_rest else None
    return None


def _nearest(described: dict[str, Any], corpus: Sequence[str]) -> Pretokenizer:
    original = Tokenizer.from_str(json.dumps(described))
    wanted = [original.encode(text, add_special_tokens=False).ids for text in corpus]
    total = sum(len(ids) for ids in wanted)
    results = []
    for preset in PRESETS:
        ours = Tokenizer.from_str(json.dumps(as_preset(described, preset)))
        got = [ours.encode(text, add_special_tokens=False).ids for text in corpus]
        wrong = [index for index in range(len(corpus)) if got[index] != wanted[index]]
        different = sum(differing(wanted[i], got[i]) for i in wrong)
        cuts = sum(len(_cuts(original, text) ^ _cuts(ours, text)) for text in corpus)
        results.append((different, cuts, preset.name, wrong))
    different, _, name, wrong = min(results, key=lambda result: result[:2])
    if not different:
        return Pretokenizer(name, f"unknown pre-tokenizer; using {name}, which tokenizes the test texts identically")
    share = different / total
    warning = (
        f"unknown pre-tokenizer; the nearest of llama.cpp's, {name}, gives other tokens for "
        f"{len(wrong)} of {len(corpus)} texts ({share:.2%} of the tokens), for example for "
        f"{min((corpus[index] for index in wrong), key=len)[:40]!r}"
    )
    if share > MOST_DIFFERENT:
        raise ModelError(f"{warning}. That is too much for a GGUF file: serve this model from its merged checkpoint")
    return Pretokenizer(name, warning)


def _cuts(tokenizer: Tokenizer, text: str) -> set[int]:
    """Where words begin."""
    cutter: Any = tokenizer.pre_tokenizer
    return {start for _, (start, _) in cutter.pre_tokenize_str(text)}


def as_preset(described: dict[str, Any], preset: Preset) -> dict[str, Any]:
    """The same tokenizer as llama.cpp would run it under another name."""
    splits = [
        {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False} for step in preset.steps
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        **described,
        "normalizer": None,
        "model": {**described["model"], "ignore_merges": preset.ignores_merges},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
    }


def differing(wanted: list[int], got: list[int]) -> int:
    """Tokens between the first and the last place where two encodings part."""
    start = 0
    while start < min(len(wanted), len(got)) and wanted[start] == got[start]:
        start += 1
    end = 0
    while end < min(len(wanted), len(got)) - start and wanted[-1 - end] == got[-1 - end]:
        end += 1
    return max(len(wanted), len(got)) - start - end
