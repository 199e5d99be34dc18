"""Answers that jobs give themselves while they train: one generator for all jobs of a run, its cache only there while
somebody is answered (rollouts.py says what comes of the answers)."""

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
"""Answers in progress at once, of all jobs together."""


@dataclass
class RolloutRequest:
    """A question, and once `RolloutGenerator.finish` was called, its answer."""

    prompt: Prompt
    config: GenerationConfig
    stop_tokens: frozenset[int]
    answer: Answer


_NO_ANSWER = Answer([], "", "error", "nobody was asked yet")


class RolloutGenerator:
    """The generator that all jobs of a run share. Its cache is only there while somebody is answered.

    Questions are divided into lanes like the work of a step (train/lanes.py), each with all its repetitions, and a lane
    is answered by itself: what is drawn does not depend on the number of ranks.
    """

    def __init__(
        self, base: Base, bank: Bank, lanes: Lanes | None = None, notify: Callable[[str], None] = log_notice
    ) -> None:
        """`notify` is called with why answers are not computed as was asked."""
        self._base, self._bank, self._lanes, self._notify = base, bank, lanes or OneLane(), notify
        self._compiled: CompiledDecoding | None = None
        self._longest = 1
        self._generator: Generator | None = None
        self._waiting: list[RolloutRequest] = []

    def reserve(self, tokens: int, *, compile: bool = False) -> None:
        """There will be prompts that have, with their answers, up to so many tokens. `compile`: answer through compiled
        decoder layers from now on. Between steps, when nobody is being answered."""
        if tokens > self._longest:
            self._longest, self._generator = tokens, None
        if compile and self._compiled is None:
            self._compiled, self._generator = CompiledDecoding(self._base, self._bank, self._notify), None

    def submit(self, prompt: Prompt, config: GenerationConfig, stop_tokens: frozenset[int]) -> RolloutRequest:
        """It is answered when somebody calls `finish`."""
        request = RolloutRequest(prompt, config, stop_tokens, _NO_ANSWER)
        self._waiting.append(request)
        return request

    def finish(self) -> None:
        """Answer everybody, and give the memory of the cache back: weights change before the next question."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        lane_of = _lanes_of([each.prompt for each in waiting], self._lanes.count)
        for lane in self._lanes.own:
            self._answer([each for each, its in zip(waiting, lane_of) if its == lane])
        if self._lanes.ranks.world > 1:
            own = [dataclasses.asdict(each.answer) if its in self._lanes.own else None
                   for each, its in zip(waiting, lane_of)]  # fmt: skip
            received = self._lanes.ranks.exchange(own)
            for place, each in enumerate(waiting):
                each.answer = Answer(**next(of_rank[place] for of_rank in received if of_rank[place] is not None))

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
    """In turns; a question that is asked several times in a row is one."""
    found: list[int] = []
    turn = -1
    for before, prompt in zip([None, *prompts], prompts):
        again = before is not None and before.slot == prompt.slot and np.array_equal(before.token_L, prompt.token_L)
        turn += not again
        found.append(turn % lanes)
    return found
