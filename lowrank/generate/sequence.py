"""One request while it is decoded: its tokens, its KV-cache pages, its text, and its listeners."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from lowrank.generate.block_manager import next_digest
from lowrank.generate.constraint import Constraint
from lowrank.generate.detokenizer import IncrementalDetokenizer
from lowrank.generate.request import Answer, GenerationConfig, Prompt, TokenChunk
from lowrank.generate.sampling import SampledToken
from lowrank.generate.token_stream import Listener, TokenStream
from lowrank.models.media_encoder import EncodedMedia


class GenerationSequence:
    """A request while it is decoded. Only the thread that makes steps touches it, but for the listeners."""

    def __init__(
        self,
        prompt: Prompt,
        config: GenerationConfig,
        *,
        stop_tokens: frozenset[int],
        max_new_tokens: int,
        tokenizer: Any,
        constraint: Constraint | None,
        virtual: int = 0,
    ) -> None:
        """`max_new_tokens`: of the answer, which may be fewer than `config` says. `virtual`: tokens of its
        slot that come before its own."""
        self.virtual = virtual
        self.tokens: list[int] = [*[0] * virtual, *prompt.token_L.tolist()]
        self.num_prompt = len(self.tokens)
        """Virtual ones included."""
        self.slot = prompt.slot
        self.media = prompt.media and prompt.media.moved(virtual)
        self.encoded: EncodedMedia | None = None
        """Features of its pictures, once the tower has run."""
        self.config = config
        self.stop_tokens = stop_tokens
        self.max_new_tokens = max_new_tokens
        self.seed = config.seed if config.seed is not None else int.from_bytes(os.urandom(8), "little")
        self.constraint = constraint
        self.text = IncrementalDetokenizer(tokenizer, config.stop, config.preserved_tokens)
        self.pages: list[int] = []
        self.digests: list[bytes] = []
        """Of the full pages of `tokens`, as far as they were asked for; starts with the root of its adapter version."""
        self.cached = 0
        """Tokens whose keys and values are in `pages`."""
        self.reused = 0
        self.finish: str | None = None
        self.stop_token: int | None = None
        self.cancelled = False
        self.single_only = False
        """It is answered without others: its length would change how their positions are read."""
        self.needs_padding = False
        """Its pictures want padded rows: it is answered in a fixed batch, with others of the kind."""
        self._stream = TokenStream()

    @property
    def in_fixed_batch(self) -> bool:
        """It has no place in steps: transformers' own `generate` answers it."""
        return self.single_only or self.needs_padding

    @property
    def remaining(self) -> int:
        """Tokens that are known and not in the cache yet. 1 when it decodes."""
        return len(self.tokens) - self.cached

    def has_prompt_of(self, other: GenerationSequence) -> bool:
        """Whether it has the same question with the same pictures."""
        length = self.num_prompt
        return (
            self.media == other.media and length == other.num_prompt and self.tokens[:length] == other.tokens[:length]
        )

    def digest(self, pages: int, page_size: int) -> list[bytes]:
        """Of the first full pages, the root left out."""
        while len(self.digests) <= pages:
            first = (len(self.digests) - 1) * page_size
            self.digests.append(next_digest(self.digests[-1], self.tokens[first : first + page_size]))
        return self.digests[1 : pages + 1]

    def take(self, choice: SampledToken) -> None:
        """Add the next token: pass its chunk to the listeners, and end the sequence if it was the last."""
        if choice.token is None:
            diverged = "the probabilities are not finite: this adapter, or the base, has diverged"
            self.fail("error", choice.fault or diverged, refused=choice.fault is not None)
            return
        if choice.token in self.stop_tokens:
            self.stop_token = choice.token
            self._end("stop", TokenChunk(None, self.text.end(), choice.logprob, choice.top))
            return
        self.tokens.append(choice.token)
        if self.constraint is not None:
            self.constraint.add(choice.token)
            if self.constraint.problem is not None:
                self.fail("error", self.constraint.problem, refused=True)
                return
        text = self.text.add(choice.token)
        chunk = TokenChunk(choice.token, text, choice.logprob, choice.top)
        if self.text.stopped_by is not None:
            self._end("stop", chunk)
        elif self.constraint is not None and self.constraint.complete:
            self._end("stop", TokenChunk(choice.token, text + self.text.end(), choice.logprob, choice.top))
        elif len(self.tokens) - self.num_prompt >= self.max_new_tokens:
            self._end("length", TokenChunk(choice.token, text + self.text.end(), choice.logprob, choice.top))
        else:
            self._stream.push(chunk)

    def fail(self, finish: str, error: str | None = None, *, refused: bool = False) -> None:
        """It ends without a last token: cancelled, or error."""
        if self.finish is None:
            self._end(finish, TokenChunk(None, self.text.end(), error=error, refused=refused))

    def listen(self, listener: Listener) -> None:
        """Call the listener with every chunk, those of the past first; from the thread that makes steps."""
        self._stream.listen(listener)

    def answer(self) -> Answer:
        """The answer as far as it is generated."""
        return self._stream.answer(
            prompt_tokens=self.num_prompt - self.virtual,
            stop_token=self.stop_token,
            reused_tokens=max(0, self.reused - self.virtual),
        )

    def _end(self, finish: str, chunk: TokenChunk) -> None:
        self.finish = finish
        self._stream.push(replace(chunk, finish=finish))
