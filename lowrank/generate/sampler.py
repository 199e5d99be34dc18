"""Many prompts at once, answered: what evaluation and the command line call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lowrank.adapters.bank import Bank
from lowrank.generate.compiled_decoding import CompiledDecoding
from lowrank.generate.generator import Generator, GeneratorConfig
from lowrank.generate.request import Answer, GenerationConfig, Prompt, TokenChunk
from lowrank.models.base import Base

__all__ = ["GenerationConfig", "Prompt", "answer_all", "generate"]

_LEAST_CACHED_TOKENS = 4096
"""Of the KV cache, however few are asked for."""


def generate(
    base: Base,
    bank: Bank,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    *,
    stop_tokens: frozenset[int],
    rows_at_once: int = 64,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, in the order given, without the stop token.

    `on_token` is called with each token of a single prompt as it comes.
    """
    assert on_token is None or len(prompts) == 1, "one prompt can be streamed at a time"

    def on_chunk(index: int, chunk: TokenChunk) -> None:
        if on_token is not None and chunk.token is not None:
            on_token(chunk.token)

    answers = answer_all(
        base, bank, prompts, config, stop_tokens=stop_tokens, rows_at_once=rows_at_once, on_chunk=on_chunk
    )
    return [answer.tokens for answer in answers]


def answer_all(
    base: Base,
    bank: Bank,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    *,
    stop_tokens: frozenset[int],
    rows_at_once: int | None = 64,
    on_chunk: Callable[[int, TokenChunk], None] | None = None,
    compiled: CompiledDecoding | None = None,
) -> list[Answer]:
    """An answer for each prompt, in the order given. `rows_at_once`: None: as many as the KV cache holds that a single
    short one takes as well. `on_chunk` is called with each (index of the prompt, chunk) as it comes.
    `compiled`: the base's compiled layers, to answer through them.

    An adapter that gives NaN has answers with `error`, and disturbs nobody. Raises RequestError.
    """
    lengths = [bank.num_virtual(prompt.slot) + len(prompt.token_L) for prompt in prompts]
    tokens_of_row = max(lengths, default=0) + config.max_new_tokens + 256
    if rows_at_once is None:
        rows_at_once = max(1, _LEAST_CACHED_TOKENS // tokens_of_row)
    room = min(rows_at_once, max(1, len(prompts))) * tokens_of_row
    settings = GeneratorConfig(max_num_seqs=rows_at_once, kv_cache_tokens=max(room, _LEAST_CACHED_TOKENS))
    generator = Generator(base, bank, settings, compiled)
    generations = []
    for index, prompt in enumerate(prompts):
        generation = generator.submit(prompt, config, stop_tokens=stop_tokens)
        if on_chunk is not None:
            generation.listen(lambda chunk, index=index: on_chunk(index, chunk))
        generations.append(generation)
    while generator.step():
        pass
    return [generation.result() for generation in generations]
