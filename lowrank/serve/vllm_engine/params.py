"""Our sampling settings as vLLM's SamplingParams, and its outputs as our chunks. Nothing here imports vLLM.

Names and meanings are those of vLLM 0.32.0 (vllm/sampling_params.py, vllm/outputs.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lowrank.generate.request import GenerationConfig, TokenChunk

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as its largest rank (vllm/config/lora.py)."""


class Output(Protocol):
    """What is read of vLLM's `CompletionOutput`; text, tokens and probabilities are those since the output before."""

    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[Mapping[int, Any]] | None
    finish_reason: str | None
    stop_reason: int | str | None


def sampling_options(config: GenerationConfig, stop_tokens: frozenset[int], most: int) -> dict[str, Any]:
    """Arguments of `SamplingParams`, but for the schema and the kind of output."""
    same = ("temperature", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logprobs")
    options: dict[str, Any] = {name: getattr(config, name) for name in same}
    options["seed"] = None if config.seed is None else config.seed % (1 << 63)
    options |= {"top_p": config.top_p, "top_k": config.top_k, "max_tokens": most}
    if config.top_p == 0:  # the likeliest token; vLLM takes no 0
        options |= {"top_p": 1.0, "top_k": 1}
    options |= {"stop": list(config.stop), "stop_token_ids": sorted(stop_tokens)}
    if config.logit_bias:
        options["logit_bias"] = dict(config.logit_bias)
    return options


def token_chunks(output: Output, num_logprobs: int) -> list[TokenChunk]:
    """One for each token, and one for what ended the answer; the text comes with the last."""
    tokens = list(output.token_ids)
    stopped_by_token = output.finish_reason == "stop" and not isinstance(output.stop_reason, str)
    if stopped_by_token and tokens:  # EOS or another stop token, which is no part of an answer
        tokens.pop()
    chances = output.logprobs or [None] * len(tokens)
    chunks = [_token_chunk(token, chance, num_logprobs) for token, chance in zip(tokens, chances)]
    if output.finish_reason is not None:
        finish = {"stop": "stop", "length": "length", "abort": "cancelled"}.get(output.finish_reason, "error")
        error = f"vLLM ended the answer: {output.finish_reason}" if finish == "error" else None
        return [*chunks, TokenChunk(None, output.text, finish=finish, error=error)]
    if chunks:
        last = chunks.pop()
        return [*chunks, TokenChunk(last.token, output.text, last.logprob, last.top)]
    return [TokenChunk(None, output.text)] if output.text else []


def rank_for(ranks: Sequence[int]) -> int:
    """The smallest that vLLM takes for these."""
    most = max(ranks, default=16)
    return next((rank for rank in _RANKS if rank >= max(16, most)), most)


def _token_chunk(token: int, chance: Mapping[int, Any] | None, num_logprobs: int) -> TokenChunk:
    if chance is None:
        return TokenChunk(token)
    likeliest = sorted(chance.items(), key=lambda each: -each[1].logprob)[:num_logprobs]
    return TokenChunk(token, "", chance[token].logprob, tuple((each, found.logprob) for each, found in likeliest))
