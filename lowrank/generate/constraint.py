"""Answers that must keep to a form: JSON of a schema, or a grammar; llguidance says which tokens may come next.

Needs `pip install 'lowrank-llm[json]'`. What a form may cost is bounded, since clients of a server send them:
llguidance counts its own work and gives up, which ends the one answer.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch

from lowrank.devices import to_device
from lowrank.generate.request import GenerationConfig, RequestError

_MOST_BYTES = 256 << 10
"""Of a schema or grammar as text."""
_LIMITS: dict[str, Any] = {
    "max_grammar_size": 200_000,  # symbols
    "initial_lexer_fuel": 1_000_000,  # about 20 ms
    "step_lexer_fuel": 200_000,  # about 15 ms
    "step_max_items": 50_000,  # about 3 ms
    "max_lexer_states": 50_000,  # 2 kB each
    "precompute_large_lexemes": False,
}
"""Of llguidance, per answer or token; its own defaults are up to five times as much."""


class Constraint:
    """The state of one answer within its form.

    problem   why no token can follow; None while one can
    """

    def __init__(self, tokenizer: Any, config: GenerationConfig, vocabulary: int, stop_tokens: frozenset[int]) -> None:
        """Raises RequestError for a form that cannot be followed, or where the package is missing."""
        if tokenizer is None:
            raise RequestError(f"{_name_of(config)} needs a tokenizer")
        begun = _begun(tokenizer, vocabulary, _grammar_of(config))
        if message := begun.get_error():
            raise _refused(config, message)
        self._matcher = begun.deep_copy()
        self._stop_tokens = sorted(stop_tokens)
        self._name = _name_of(config)
        self.problem: str | None = None

    @property
    def complete(self) -> bool:
        """Nothing can follow."""
        return self._matcher.is_stopped() and self.problem is None

    def mask(self, logits_V: torch.Tensor) -> None:
        """Take all tokens out that may not come next; the answer may stop where its form is whole."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).view(-1).bool()
        keep_V = torch.zeros(len(logits_V), dtype=torch.bool)
        known = min(len(keep_V), len(allowed))
        keep_V[:known] = allowed[:known]
        accepting = self._matcher.is_accepting()
        if self._stop_tokens:
            keep_V[self._stop_tokens] = accepting
        if not keep_V.any():
            self._give_up()
        logits_V.masked_fill_(to_device(~keep_V, logits_V.device), float("-inf"))

    def add(self, token: int) -> None:
        """The token that was chosen."""
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            self._give_up()

    def _give_up(self) -> None:
        described = _first_line(self._matcher.get_error()) or "no token of this model fits there"
        self.problem = f"{self._name} cannot be followed any further: {described}"


def check_form(config: GenerationConfig) -> None:
    """RequestError for a schema or grammar that no answer can follow, whatever model is asked."""
    if config.json_schema is None and config.grammar is None:
        return
    native, grammar = _native(config), _grammar_of(config)
    message = native.LLMatcher.validate_grammar(grammar, None, limits=native.LLParserLimits(**_LIMITS))
    if message and not message.startswith("WARNING"):
        raise _refused(config, message)


def _native(config: GenerationConfig) -> Any:
    try:
        import llguidance  # optional third-party package
    except ImportError as error:
        raise RequestError(f"{_name_of(config)} needs another package: pip install 'lowrank-llm[json]'") from error
    return llguidance


def _grammar_of(config: GenerationConfig) -> str:
    """In llguidance's own form."""
    native = _native(config)
    try:
        text = config.grammar if config.grammar is not None else json.dumps(config.json_schema, allow_nan=False)
        if len(text) > _MOST_BYTES:
            raise RequestError(f"{_name_of(config)}: {len(text)} characters; {_MOST_BYTES} are read")
        if config.grammar is not None:
            return native.LLMatcher.grammar_from_lark(text)
        return native.LLMatcher.grammar_from_json_schema(text)
    except (ValueError, RecursionError) as error:
        raise _refused(config, str(error)) from error


@lru_cache(maxsize=4)
def _begun(tokenizer: Any, vocabulary: int, grammar: str) -> Any:
    """An answer's state before its first token; several answers of one form share the work."""
    import llguidance  # the caller saw that it is there

    limits = llguidance.LLParserLimits(**_LIMITS)
    return llguidance.LLMatcher(_vocabulary_of(tokenizer, vocabulary), grammar, log_level=0, limits=limits)


@lru_cache(maxsize=4)
def _vocabulary_of(tokenizer: Any, size: int) -> Any:
    """llguidance's own view of a tokenizer; takes a second for a large one."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=size)


def _name_of(config: GenerationConfig) -> str:
    return "json_schema" if config.grammar is None else "grammar"


def _refused(config: GenerationConfig, message: str) -> RequestError:
    return RequestError(f"{_name_of(config)} cannot be followed: {_first_line(message)}")


def _first_line(message: str) -> str:
    return next(iter(message.strip().splitlines()), "")[:300]
