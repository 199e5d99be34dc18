"""Continuous batching: any number of requests, each for its own adapter, answered together on one base.

    submit --> waiting --> running: pages of the cache, a place in every step --> finished: pages free again

A step is one forward pass over a flat stream: the next token of every sequence that is answering, and pieces
of the questions of those that are not there yet, so a long question never stands in the way of others
(chunked prefill, arXiv:2308.16369). Sequences join and leave between steps (Orca, OSDI 2022).

Everything that touches the model happens in the thread that makes steps: a thread of its own after `start`,
else whoever iterates over an answer. Other threads leave what they want in an inbox.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.routing import ForwardContext
from lowrank.adapters.soft_prompts import virtual_token_rows
from lowrank.devices import to_device
from lowrank.generate import transformers_fallback
from lowrank.generate.admission import RequestAdmission
from lowrank.generate.block_manager import BlockManager
from lowrank.generate.compiled_decoding import CompiledDecoding
from lowrank.generate.generation import Generation
from lowrank.generate.prompt_media import encode_media, encoded_chunks
from lowrank.generate.request import GenerationConfig, Prompt
from lowrank.generate.sampling import choose
from lowrank.generate.scheduler import GeneratorConfig, Scheduler
from lowrank.generate.sequence import GenerationSequence
from lowrank.kernels.glibc_malloc import Heap
from lowrank.kernels.shape_bucketing import bucketed_rows
from lowrank.models.attention.paged import KVCache, PagedBatch, SequenceChunk
from lowrank.models.base import Base
from lowrank.models.checks.kv_cache import known_kv_cache_mismatch

Result = TypeVar("Result")
_PAGE = 16
"""Tokens of a page on a CPU, where pages are copied together before they are used."""
_KERNEL_PAGE = 256


class Generator:
    """Answers requests for the adapters of a bank, and for its bare base.

    `notice` says why a family cannot be served so and is answered in fixed batches; None where all is well.
    """

    def __init__(
        self,
        base: Base,
        bank: Bank,
        config: GeneratorConfig | None = None,
        compiled: CompiledDecoding | None = None,
    ) -> None:
        """`compiled`: the compiled layers of `base`, which outlive a generator; left out, of its own where
        `config.compile` says so."""
        self.base = base
        self.bank = bank
        self.config = config or GeneratorConfig()
        if base.layer_wrapper is not None:  # a wrapped layer's pages may hold fewer tokens: others cannot use them
            self.config = self.config.model_copy(update={"enable_prefix_caching": False})
        with bank.routing.using(ForwardContext()):  # of the bare base
            reason = known_kv_cache_mismatch(base)
        self.notice = None if reason is None else f"requests are answered in fixed batches, which is slower: {reason}"
        self.compiled = compiled or (CompiledDecoding(base, bank) if self.config.compile else None)
        if self.compiled is not None and self.notice is not None:
            self.compiled.give_up(self.notice)
        size = _KERNEL_PAGE if base.device.type == "cuda" else _PAGE
        num_pages = 1 + -(-self.config.kv_cache_tokens // size)
        self._cache = KVCache(num_pages, size)
        self.schedule = Scheduler(BlockManager(num_pages, size), self.config)
        self._admission = RequestAdmission(base, bank, room=self.schedule.block_manager.capacity * size)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stepping = threading.RLock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closing = False

    # -- what others call, from any thread

    def submit(
        self, prompt: Prompt, config: GenerationConfig, *, stop_tokens: frozenset[int] = frozenset()
    ) -> Generation:
        """Start answering; RequestError if it can never be answered."""
        sequence = self._admission.sequence(prompt, config, stop_tokens, self.notice)
        self.post(lambda: self.schedule.waiting.append(sequence))
        return Generation(self, sequence)

    def cancel(self, sequence: GenerationSequence) -> None:
        """Its pages are free before the next step. A finished one stays as it is."""
        sequence.cancelled = True
        self.post(self._drop_cancelled)

    def between_steps(self, function: Callable[[], Result]) -> Result:
        """Run `function` while no step is running: to add, remove or change adapters of the bank."""
        if self._thread is None or self._thread is threading.current_thread():
            with self._stepping:
                return function()
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self.post(run)
        return future.result()

    def post(self, function: Callable[[], None]) -> None:
        """Have `function` run before the next step, and do not wait for it."""
        self._inbox.put(function)
        self._wake.set()

    def changed(self, slot: int) -> None:
        """The weights of a slot are others now: nothing computed with the old ones is used again.

        Sequences in the middle of an answer go on with the new ones, and read their text again.
        """
        self.between_steps(lambda: self._forget(slot))

    def free_kv_cache(self) -> None:
        """Give the memory of the cache back until the next request; nothing computed so far is used again."""
        with self._stepping:
            assert not self.busy, "somebody is being answered"
            self._cache = KVCache(self._cache.num_pages, self._cache.page_size)
            self.schedule.block_manager = BlockManager(self._cache.num_pages, self._cache.page_size)

    @property
    def busy(self) -> bool:
        """Somebody waits for an answer."""
        return bool(self.schedule.running or self.schedule.waiting or not self._inbox.empty())

    @property
    def num_running(self) -> int:
        """Sequences that have a place in the steps."""
        return len(self.schedule.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that have none yet."""
        return len(self.schedule.waiting) + self._inbox.qsize()

    @property
    def free_tokens(self) -> int:
        """Room in the cache for tokens of new sequences."""
        return self.schedule.block_manager.available * self.schedule.block_manager.page_size

    @property
    def image_problem(self) -> str | None:
        """Why nobody can be asked about pictures here, in words; None: all is well."""
        return self._admission.image_problem(fixed=self.notice is not None)

    # -- a thread of its own

    def start(self) -> None:
        """Make steps in a thread from now on, whenever there is something to do."""
        assert self._thread is None, "it runs already"
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="lowrank-generator", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread after the running step; what is not finished ends as cancelled."""
        thread, self._closing = self._thread, True
        self._wake.set()
        if thread is not None:
            thread.join()
        self._thread = None
        with self._stepping:
            self._read_inbox()
            for sequence in [*self.schedule.running, *self.schedule.waiting]:
                sequence.cancelled = True
            self._drop_cancelled()

    @property
    def threaded(self) -> bool:
        """Whether a thread of the generator makes the steps."""
        return self._thread is not None

    def _run(self) -> None:
        heap = Heap()
        heap.trim()  # loading leaves as much as a small model has
        while not self._closing:
            if not self.busy:
                self._wake.wait()
            self._wake.clear()
            try:
                self.step()
            except Exception as error:
                self._fail_all(f"{type(error).__name__}: {error}")
            heap.after_step()

    # -- one step

    @torch.no_grad()
    def step(self) -> bool:
        """Compute the next token of every sequence, or a chunk of its prompt; False if there is none."""
        with self._stepping:
            self._read_inbox()
            if self.notice is not None:
                return self._fixed_batch(self.config.max_num_seqs)
            if together := self.schedule.next_fixed_batch:
                return self._fixed_batch(together)
            plan = self.schedule.plan()
            if not plan:
                return False
            encode_media(self.base, self.bank, [sequence for sequence, _ in plan], self.schedule.running)
            plan = [(sequence, length) for sequence, length in plan if sequence.finish is None]
            logits_BV, rows = self._forward(plan) if plan else (torch.empty(0), [])
            for sequence, choice in zip(rows, choose(logits_BV, rows) if rows else ()):
                sequence.take(choice)
            self.schedule.drop_finished()
            return True

    def _read_inbox(self) -> None:
        while True:
            try:
                function = self._inbox.get_nowait()
            except queue.Empty:
                return
            function()

    def _forward(self, plan: list[tuple[GenerationSequence, int]]) -> tuple[torch.Tensor, list[GenerationSequence]]:
        """Logits (B, V) of those whose next token is wanted now."""
        spans, tokens, ends, rows = [], [], [], []
        chunks = encoded_chunks(plan)
        for sequence, length in plan:
            known = -(-sequence.cached // self._cache.page_size)
            spans.append(SequenceChunk(sequence.cached, length, sequence.pages, fresh=sequence.pages[known:]))
            tokens += sequence.tokens[sequence.cached : sequence.cached + length]
            if length == sequence.remaining:
                rows.append(sequence)
                ends.append(len(tokens) - 1)
        device = self.base.device
        added = self._rows_for(len(tokens)) - len(tokens)
        ranges = _ranges([(each.slot, length) for each, length in plan])
        runs = virtual_token_rows([(each.slot, each.virtual, each.cached, length) for each, length in plan])
        filler = tokens[-1] if not chunks else 0  # a placeholder would want a picture
        token_T = to_device(torch.tensor([*tokens, *[filler] * added]), device)
        batch = PagedBatch(self._cache, spans, device, added=added)
        context = ForwardContext(len(token_T), ranges, virtual=runs, decoding=True)
        hidden_TD = None
        if self.compiled is not None and not (chunks or runs) and all(length == 1 for _, length in plan):
            hidden_TD = self.compiled.hidden(token_T, batch, context)
        if hidden_TD is None:
            with self.bank.routing.using(context):
                hidden_TD = self.base.forward_with_kv_cache(token_T, batch, chunks)
        for sequence, length in plan:
            self.schedule.advance(sequence, length)
        ends += [0] * (self._rows_for(len(ends)) - len(ends))
        return self._logits(hidden_TD[to_device(torch.tensor(ends, dtype=torch.int64), device)], rows), rows

    def _logits(self, hidden_BD: torch.Tensor, rows: list[GenerationSequence]) -> torch.Tensor:
        """By the model's own head module, which the bank may have routed."""
        ranges = _ranges([(each.slot, 1) for each in rows])
        with self.bank.routing.using(ForwardContext(len(hidden_BD), ranges, decoding=True)):
            logits_BV = self.base.model.get_output_embeddings()(hidden_BD)
        return self.base.head().finish(logits_BV[: len(rows)])

    def _rows_for(self, rows: int) -> int:
        """On a CPU every new number of rows costs time and memory (kernels/shape_bucketing.py), and compiled layers a
        comparison and a graph of each layer, so there are few."""
        few = self.base.device.type == "cpu" or self.compiled is not None
        return bucketed_rows(rows) if rows and few else rows

    def _fixed_batch(self, most: int) -> bool:
        """Where the cache is not ours: whoever waits, as one batch, to its end."""
        rows = self.schedule.pop_waiting(most)
        if rows:
            encode_media(self.base, self.bank, rows, self.schedule.running)
            left = [row for row in rows if row.finish is None]
            if left:
                transformers_fallback.answer(self.base, self.bank, left, self._drop_cancelled)
            self.schedule.running = []
        return bool(rows)

    def _drop_cancelled(self) -> None:
        for sequence in (*self.schedule.running, *self.schedule.waiting):
            if sequence.cancelled:
                sequence.fail("cancelled")
        running = self.schedule.running
        fixed = self.notice is not None or bool(running and running[0].in_fixed_batch)
        self.schedule.drop_finished(running=not fixed)  # a fixed batch goes on without them

    def _fail_all(self, error: str) -> None:
        """A step went wrong; what it left behind must not be used.

        Who was in it ends; if nobody was, whoever waits would make every step to come go wrong, so they end.
        """
        with self._stepping:
            for sequence in self.schedule.running or self.schedule.waiting:
                sequence.fail("error", error)
            for slot in {sequence.slot for sequence in self.schedule.running}:
                self.schedule.invalidate(slot)
            self.schedule.drop_finished()

    def _forget(self, slot: int) -> None:
        self._read_inbox()
        self.schedule.invalidate(slot)
        for sequence in [each for each in self.schedule.running if each.slot == slot]:
            self.schedule.preempt(sequence)


def _ranges(lengths: list[tuple[int, int]]) -> tuple[tuple[int, int, int], ...]:
    """(slot, first row, end row) of sorted (slot, number of rows)."""
    ranges: list[tuple[int, int, int]] = []
    start = 0
    for slot, length in lengths:
        same = bool(ranges) and ranges[-1][0] == slot
        first = ranges.pop()[1] if same else start
        start += length
        ranges.append((slot, first, start))
    return tuple(ranges)
