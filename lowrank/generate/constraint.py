"""Answers that must be JSON of a given schema: llguidance says which tokens may come next.

Needs `pip install lowrank[json]`.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch

from lowrank.generate.request import RequestError


class JsonConstraint:
    """The state of one answer within its schema."""

    def __init__(self, tokenizer: Any, schema: dict[str, Any], vocabulary: int, stop_tokens: frozenset[int]) -> None:
        """Raises RequestError for a schema that cannot be followed, or where the package is missing."""
        try:
            import llguidance  # optional third-party package
        except ImportError as error:
            raise RequestError("json_schema needs another package: pip install lowrank[json]") from error
        if tokenizer is None:
            raise RequestError("json_schema needs a tokenizer")
        self._native = llguidance
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
            self._matcher = llguidance.LLMatcher(_vocabulary_of(tokenizer, vocabulary), grammar)
            problem = self._matcher.get_error()
        except ValueError as error:
            problem = str(error)
        if problem:
            raise RequestError(f"json_schema cannot be followed: {problem.strip().splitlines()[0]}")
        self._stop_tokens = sorted(stop_tokens)

    @property
    def complete(self) -> bool:
        """Nothing can follow."""
        return self._matcher.is_stopped()

    def mask(self, logits_V: torch.Tensor) -> None:
        """Take all tokens out that may not come next; the answer may stop where the JSON is whole."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).view(-1).bool()
        keep_V = torch.zeros(len(logits_V), dtype=torch.bool)
        known = min(len(keep_V), len(allowed))
        keep_V[:known] = allowed[:known]
        if self._stop_tokens:
            keep_V[self._stop_tokens] = self._matcher.is_accepting()
        logits_V.masked_fill_(~keep_V.to(logits_V.device), float("-inf"))

    def add(self, token: int) -> None:
        """The token that was chosen."""
        self._matcher.consume_token(token)


@lru_cache(maxsize=4)
def _vocabulary_of(tokenizer: Any, size: int) -> Any:
    """llguidance's own view of a tokenizer; takes a second for a large one."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=size)
