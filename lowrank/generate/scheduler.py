"""Continuous batching: which sequences take part in the next step, chunked prefill, and preemption when the KV cache is
full."""

from __future__ import annotations

from collections import defaultdict, deque
from itertools import takewhile

from lowrank.generate.block_manager import BlockManager, root_digest
from lowrank.generate.sequence import GenerationSequence
from lowrank.settings import Positive, Settings


class GeneratorConfig(Settings):
    """How much is answered at once."""

    max_num_seqs: Positive = 64
    """Sequences in one step at the most; others wait."""
    max_num_batched_tokens: Positive = 512
    """Tokens of one step at the most: one for each sequence that answers, and the rest for pieces of questions."""
    kv_cache_tokens: Positive = 65536
    """Tokens whose keys and values are kept, of all sequences together."""
    enable_prefix_caching: bool = True
    """Keep the keys of finished sequences while there is room, for others that begin alike."""
    compile: bool = False
    """Answer through decoder layers compiled by torch (on NVIDIA's GPUs with CUDA graphs) wherever all sequences of a
    step are answering. The first step of each number of rows is made both ways and compared; the first of all compiles,
    up to a minute."""


class Scheduler:
    """Sequences that wait and those that have a place in the steps. Touched only by the thread that makes steps."""

    def __init__(self, table: BlockManager, config: GeneratorConfig) -> None:
        self.block_manager = table
        self.config = config
        self.waiting: deque[GenerationSequence] = deque()
        self.running: list[GenerationSequence] = []
        self._version: defaultdict[int, int] = defaultdict(int)
        """Of each slot's weights."""

    @property
    def next_fixed_batch(self) -> int:
        """How many of those who come next are answered as one fixed batch; 0: nobody, or others are being answered."""
        if self.running or not self.waiting:
            return 0
        if self.waiting[0].single_only:
            return 1
        alike = takewhile(lambda sequence: sequence.needs_padding and not sequence.single_only, self.waiting)
        return min(self.config.max_num_seqs, sum(1 for _ in alike))

    def plan(self) -> list[tuple[GenerationSequence, int]]:
        """Who gets how many tokens of this step, by slot; pages are taken."""
        planned: dict[int, int] = {}
        budget = self.config.max_num_batched_tokens
        for sequence in list(self.running):  # those who answer come first: nobody waits for another's question
            if sequence in self.running and sequence.remaining == 1 and self._make_room(sequence, 1):
                planned[id(sequence)] = 1
                budget -= 1
        for sequence in list(self.running):
            if budget > 0 and sequence in self.running and sequence.remaining > 1:
                length = min(sequence.remaining, budget)
                if self._make_room(sequence, length):
                    planned[id(sequence)] = length
                    budget -= length
        while budget > 0 and self.waiting and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting[0]
            if sequence.in_fixed_batch or not self._admit(sequence):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            length = min(sequence.remaining, budget)
            taken = self._make_room(sequence, length)
            assert taken, "it was admitted because there is room"
            planned[id(sequence)] = length
            budget -= length
        plan = [(each, planned[id(each)]) for each in self.running if id(each) in planned]
        return sorted(plan, key=lambda entry: entry[0].slot)

    def _admit(self, sequence: GenerationSequence) -> bool:
        """Whether there is room for all of its tokens; then it has the pages that are known already."""
        size = self.block_manager.page_size
        sequence.digests = [root_digest(sequence.slot, self._version[sequence.slot], sequence.media)]
        if self.config.enable_prefix_caching:  # the last token is always computed: its logits are wanted
            sequence.pages = self.block_manager.find(sequence.digest((len(sequence.tokens) - 1) // size, size))
        if self.block_manager.available < -(-(len(sequence.tokens) + 1) // size) - len(sequence.pages) and self.running:
            self.block_manager.release(sequence.pages)
            sequence.pages = []
            return False
        sequence.cached = len(sequence.pages) * size
        sequence.reused = min(sequence.cached, sequence.num_prompt)
        return True

    def _make_room(self, sequence: GenerationSequence, length: int) -> bool:
        """Pages for `length` tokens more; puts the youngest aside where there are none. False if it was itself."""
        needed = -(-(sequence.cached + length) // self.block_manager.page_size)
        while len(sequence.pages) < needed:
            if self.block_manager.available:
                sequence.pages.append(self.block_manager.take())
                continue
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def preempt(self, sequence: GenerationSequence) -> None:
        """It gives its pages back, and reads its text again when there is room."""
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: GenerationSequence) -> None:
        self.block_manager.release(sequence.pages)
        sequence.pages, sequence.cached = [], 0

    def advance(self, sequence: GenerationSequence, length: int) -> None:
        """`length` tokens more are in the cache; pages that became full can be found by others."""
        size = self.block_manager.page_size
        before, sequence.cached = sequence.cached, sequence.cached + length
        if self.config.enable_prefix_caching and before // size < sequence.cached // size:
            digests = sequence.digest(sequence.cached // size, size)
            for place in range(before // size, sequence.cached // size):
                self.block_manager.register(sequence.pages[place], digests[place])

    def pop_waiting(self, most: int) -> list[GenerationSequence]:
        """Up to `most` of those who wait, by slot; they are the running ones now."""
        rows = [self.waiting.popleft() for _ in range(min(len(self.waiting), most))]
        self.running = sorted(rows, key=lambda sequence: sequence.slot) if rows else self.running
        return self.running if rows else []

    def drop_finished(self, *, running: bool = True) -> None:
        """Whoever came to an end leaves; its pages are free."""
        self.waiting = deque(sequence for sequence in self.waiting if sequence.finish is None)
        if running:
            for sequence in self.running:
                if sequence.finish is not None:
                    self._release(sequence)
            self.running = [sequence for sequence in self.running if sequence.finish is None]

    def invalidate(self, slot: int) -> None:
        """Nothing that was computed for a slot so far is found again."""
        self._version[slot] += 1
