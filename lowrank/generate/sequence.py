"""One request while it is answered: its tokens, its pages, its text, and whoever listens."""

from __future__ import annotations

import os
from typing import Any

from lowrank.generate.constraint import JsonConstraint
from lowrank.generate.pages import next_digest
from lowrank.generate.request import Answer, Config, Piece, Prompt
from lowrank.generate.sampling import Choice
from lowrank.generate.streaming import TextStream
from lowrank.generate.telling import Listener, Telling


class Sequence:
    """The generator's own view of a request. Touched only by the thread that makes steps, but for the listeners."""

    def __init__(
        self,
        prompt: Prompt,
        config: Config,
        *,
        stop_tokens: frozenset[int],
        most: int,
        tokenizer: Any,
        constraint: JsonConstraint | None,
        virtual: int = 0,
    ) -> None:
        """`most`: tokens of the answer at the most, which may be fewer than `config` says. `virtual`: tokens of its
        slot that come before its own."""
        self.virtual = virtual
        self.tokens: list[int] = [*[0] * virtual, *prompt.token_L.tolist()]
        self.num_prompt = len(self.tokens)
        """Virtual ones included."""
        self.slot = prompt.slot
        self.config = config
        self.stop_tokens = stop_tokens
        self.most = most
        self.seed = config.seed if config.seed is not None else int.from_bytes(os.urandom(8), "little")
        self.constraint = constraint
        self.text = TextStream(tokenizer, config.stop)
        self.pages: list[int] = []
        self.digests: list[bytes] = []
        """Of the full pages of `tokens`, as far as they were asked for; starts with the root of its adapter version."""
        self.cached = 0
        """Tokens whose keys and values are in `pages`."""
        self.reused = 0
        self.finish: str | None = None
        self.stop_token: int | None = None
        self.cancelled = False
        self.alone = False
        """It is answered by itself: its length would change how positions of others are read."""
        self._telling = Telling()

    @property
    def remaining(self) -> int:
        """Tokens that are known and not in the cache yet. 1 when it decodes."""
        return len(self.tokens) - self.cached

    def digest(self, pages: int, page_size: int) -> list[bytes]:
        """Of the first full pages, the root left out."""
        while len(self.digests) <= pages:
            first = (len(self.digests) - 1) * page_size
            self.digests.append(next_digest(self.digests[-1], self.tokens[first : first + page_size]))
        return self.digests[1 : pages + 1]

    def take(self, choice: Choice) -> None:
        """The next token; tells the listeners, and knows afterwards whether it was the last."""
        if choice.token is None:
            self.give_up("error", "the probabilities are not finite: this adapter, or the base, has diverged")
            return
        if choice.token in self.stop_tokens:
            self.stop_token = choice.token
            self._end("stop", Piece(None, self.text.end(), choice.logprob, choice.top))
            return
        self.tokens.append(choice.token)
        if self.constraint is not None:
            self.constraint.add(choice.token)
        text = self.text.add(choice.token)
        piece = Piece(choice.token, text, choice.logprob, choice.top)
        if self.text.stopped_by is not None:
            self._end("stop", piece)
        elif self.constraint is not None and self.constraint.complete:
            self._end("stop", Piece(choice.token, text + self.text.end(), choice.logprob, choice.top))
        elif len(self.tokens) - self.num_prompt >= self.most:
            self._end("length", Piece(choice.token, text + self.text.end(), choice.logprob, choice.top))
        else:
            self._telling.tell(piece)

    def give_up(self, finish: str, error: str | None = None) -> None:
        """It ends without a last token: cancelled, or error."""
        if self.finish is None:
            self._end(finish, Piece(None, self.text.end(), error=error))

    def listen(self, listener: Listener) -> None:
        """Hear every piece, those of the past first. The listener is called from the thread that makes steps."""
        self._telling.listen(listener)

    def answer(self) -> Answer:
        """What there is so far."""
        return self._telling.answer(
            prompt_tokens=self.num_prompt - self.virtual,
            stop_token=self.stop_token,
            reused_tokens=max(0, self.reused - self.virtual),
        )

    def _end(self, finish: str, piece: Piece) -> None:
        self.finish = finish
        self._telling.tell(Piece(piece.token, piece.text, piece.logprob, piece.top, finish, piece.error))
