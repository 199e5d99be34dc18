"""The token stream of one answer: its chunks, kept for late listeners and pushed to the others."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lowrank.generate.request import Answer, TokenChunk

Listener = Callable[[TokenChunk], None]


class TokenStream:
    """All methods may be called from any thread; listeners are called from the one that tells."""

    def __init__(self) -> None:
        self._chunks: list[TokenChunk] = []
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()

    @property
    def finished(self) -> bool:
        """The last chunk was pushed."""
        return bool(self._chunks) and self._chunks[-1].finish is not None

    def listen(self, listener: Listener) -> None:
        """Call the listener with every chunk, those of the past first."""
        with self._lock:
            for chunk in self._chunks:
                listener(chunk)
            if not self.finished:
                self._listeners.append(listener)

    def push(self, chunk: TokenChunk) -> None:
        """One chunk more."""
        with self._lock:
            self._chunks.append(chunk)
            for listener in self._listeners:
                listener(chunk)
            if chunk.finish is not None:  # who listens often holds the answer: together they would wait for the
                self._listeners.clear()  # collector of cycles, which comes rarely beside a model's many objects

    def answer(self, *, prompt_tokens: int, stop_token: int | None = None, reused_tokens: int = 0) -> Answer:
        """The answer as far as it is generated."""
        chunks = list(self._chunks)
        described = [chunk for chunk in chunks if chunk.token is not None]
        return Answer(
            tokens=[chunk.token for chunk in described if chunk.token is not None],
            text="".join(chunk.text for chunk in chunks),
            finish=next((chunk.finish for chunk in chunks if chunk.finish), ""),
            logprobs=[chunk.logprob for chunk in described if chunk.logprob is not None],
            top=[chunk.top for chunk in described],
            error=next((chunk.error for chunk in chunks if chunk.error), None),
            prompt_tokens=prompt_tokens,
            stop_token=stop_token,
            cached_tokens=reused_tokens,
        )
