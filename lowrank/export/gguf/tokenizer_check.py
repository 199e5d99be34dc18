"""Compares llama.cpp's tokens with those of the tokenizer that the model was trained with."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from lowrank.export.gguf.corpus import CORPUS
from lowrank.export.gguf.llama_cpp import LlamaCpp
from lowrank.export.gguf.pretokenizers import differing


@dataclass(frozen=True)
class TokenizerComparison:
    """`different`: texts that come out otherwise; `share`: of their tokens."""

    texts: int
    different: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        if not self.different:
            return f"llama.cpp gives the same tokens for all {self.texts} texts it was tried on"
        example = min(self.different, key=len)[:40]
        return (
            f"llama.cpp gives other tokens for {len(self.different)} of {self.texts} texts ({self.share:.2%} of the "
            f"tokens), for example for {example!r}"
        )


def compare_tokenizers(path: Path, folder: Path, texts: Sequence[str] = CORPUS) -> TokenizerComparison:
    """The file's tokenizer against tokenizer.json of `folder`, on normalized (NFC) texts with their special tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    tried = [unicodedata.normalize("NFC", text) for text in texts]
    tried += [f"before{token}after {token} 你好{token}" for token in special[:64]]
    with LlamaCpp(path, vocab_only=True) as llama:
        theirs = llama.tokenize(tried)
    ours = [tokenizer.encode(text, add_special_tokens=False).ids for text in tried]
    wrong = [index for index in range(len(tried)) if ours[index] != theirs[index]]
    share = sum(differing(ours[index], theirs[index]) for index in wrong) / sum(len(ids) for ids in ours)
    return TokenizerComparison(len(tried), tuple(tried[index] for index in wrong), share)
