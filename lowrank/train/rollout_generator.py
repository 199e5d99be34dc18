"""Generation of rollouts: one generator for all jobs of a run, whose KV cache exists only while it generates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lowrank.adapters.bank import Bank
from lowrank.generate.compiled_decoding import CompiledDecoding
from lowrank.generate.generator import Generator, GeneratorConfig
from lowrank.generate.request import Answer, GenerationConfig, Prompt
from lowrank.models.base import Base
from lowrank.notices import log_notice
from lowrank.train.lanes import Lanes, OneLane

ROWS = 64
"""Sequences that are generated at once, of all jobs together."""


@dataclass
class RolloutRequest:
    """A prompt, and after `RolloutGenerator.finish`, its answer."""

    prompt: Prompt
    config: GenerationConfig
    stop_tokens: frozenset[int]
    answer: Answer


_NO_ANSWER = Answer([], "", "error", "not generated yet")


class RolloutGenerator:
    """The generator of all jobs of a run.

    Prompts are divided into lanes like the work of a step (train/lanes.py), each with all its repetitions, and lanes
    are generated one after another, so sampling does not depend on the number of ranks."""

    def __init__(
        self, base: Base, bank: Bank, lanes: Lanes | None = None, notify: Callable[[str], None] = log_notice
    ) -> None:
        """`notify` is called with a text if compiled decoding is not possible."""
        self._base, self._bank, self._lanes, self._notify = base, bank, lanes or OneLane(), notify
        self._compiled: CompiledDecoding | None = None
        self._longest = 1
        self._generator: Generator | None = None
        self._waiting: list[RolloutRequest] = []

    def reserve(self, tokens: int, *, compile: bool = False) -> None:
        """Reserve room for prompts that have, with their answers, up to `tokens` tokens. `compile`: generate through
        compiled decoder layers from now on. Called only while nothing is generated."""
        if tokens > self._longest:
            self._longest, self._generator = tokens, None
        if compile and self._compiled is None:
            self._compiled, self._generator = CompiledDecoding(self._base, self._bank, self._notify), None

    def submit(self, prompt: Prompt, config: GenerationConfig, stop_tokens: frozenset[int]) -> RolloutRequest:
        """Add a prompt, which is answered at the next `finish`."""
        request = RolloutRequest(prompt, config, stop_tokens, _NO_ANSWER)
        self._waiting.append(request)
        return request

    def finish(self) -> None:
        """Generate all answers, and free the KV cache, since weights change before the next prompts."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        lane_of = _lanes_of([each.prompt for each in waiting], self._lanes.count)
        for lane in self._lanes.local:
            self._answer([each for each, of_prompt in zip(waiting, lane_of) if of_prompt == lane])
        if self._lanes.ranks.world > 1:
            answers = [dataclasses.asdict(each.answer) if lane in self._lanes.local else None
                       for each, lane in zip(waiting, lane_of)]  # fmt: skip
            received = self._lanes.ranks.exchange(answers)
            for index, each in enumerate(waiting):
                each.answer = Answer(**next(of_rank[index] for of_rank in received if of_rank[index] is not None))

    def _answer(self, waiting: Sequence[RolloutRequest]) -> None:
        if not waiting:
            return
        if self._generator is None:
            room = ROWS * (self._longest + 32)
            self._generator = Generator(
                self._base, self._bank, GeneratorConfig(max_num_seqs=ROWS, kv_cache_tokens=room), self._compiled
            )
        answering = [self._generator.submit(each.prompt, each.config, stop_tokens=each.stop_tokens) for each in waiting]
        while self._generator.step():
            pass
        self._generator.free_kv_cache()
        for each, generation in zip(waiting, answering):
            each.answer = generation.answer


def _lanes_of(prompts: Sequence[Prompt], lanes: int) -> list[int]:
    """Return the lane of each prompt, in turns. Repetitions of a prompt stay together."""
    found: list[int] = []
    turn = -1
    for before, prompt in zip([None, *prompts], prompts):
        again = before is not None and before.slot == prompt.slot and np.array_equal(before.token_L, prompt.token_L)
        turn += not again
        found.append(turn % lanes)
    return found
