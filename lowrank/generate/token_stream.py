"""The token stream of one answer: its chunks, kept for late listeners and pushed to the others."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lowrank.generate.request import Answer, TokenChunk

Listener = Callable[[TokenChunk], None]


class TokenStream:
    """All methods may be called from any thread; listeners are called from the one that tells."""

    def __init__(self) -> None:
        self._pieces: list[TokenChunk] = []
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()

    @property
    def finished(self) -> bool:
        """The last piece was told."""
        return bool(self._pieces) and self._pieces[-1].finish is not None

    def listen(self, listener: Listener) -> None:
        """Hear every piece, those of the past first."""
        with self._lock:
            for piece in self._pieces:
                listener(piece)
            if not self.finished:
                self._listeners.append(listener)

    def push(self, piece: TokenChunk) -> None:
        """One piece more."""
        with self._lock:
            self._pieces.append(piece)
            for listener in self._listeners:
                listener(piece)
            if piece.finish is not None:  # who listens often holds the answer: together they would wait for the
                self._listeners.clear()  # collector of cycles, which comes rarely beside a model's many objects

    def answer(self, *, prompt_tokens: int, stop_token: int | None = None, reused_tokens: int = 0) -> Answer:
        """What there is so far."""
        pieces = list(self._pieces)
        described = [piece for piece in pieces if piece.token is not None]
        return Answer(
            tokens=[piece.token for piece in described if piece.token is not None],
            text="".join(piece.text for piece in pieces),
            finish=next((piece.finish for piece in pieces if piece.finish), ""),
            logprobs=[piece.logprob for piece in described if piece.logprob is not None],
            top=[piece.top for piece in described],
            error=next((piece.error for piece in pieces if piece.error), None),
            prompt_tokens=prompt_tokens,
            stop_token=stop_token,
            cached_tokens=reused_tokens,
        )
