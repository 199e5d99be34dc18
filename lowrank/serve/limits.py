"""Limits of a server: on the size, the number and the time of requests."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lowrank.settings import NonNegative, Positive, Settings


class RequestLimits(Settings):
    """Limits on the requests of one client, and of all together."""

    body_bytes: Positive = 4 << 20
    """Bytes of one request."""
    body_bytes_with_pictures: Positive = 24 << 20
    """The same, where the model may be shown pictures."""
    picture_bytes: Positive = 8 << 20
    """Bytes of one picture's file."""
    picture_pixels: Positive = 1 << 24
    """Width times height that its header may say; nothing larger is decoded."""
    pictures_per_request: NonNegative = 16
    """In all turns together."""
    header_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Seconds from a connection's first byte, or its opening, to the end of its request's header."""
    body_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Seconds a client may take to send its request."""
    max_num_seqs: Positive = 64
    """Answers in progress; more wait."""
    waiting: NonNegative = 256
    """Answers that may wait; beyond, clients are told to come back (429)."""
    connections: Positive = 704
    """Open at once; beyond, those that ask for nothing are closed, without a token first."""
    messages_per_request: Positive = 4096
    """Turns of a conversation."""
    stop_letters: Positive = 1024
    """Of one stop text."""
    answers_per_request: Positive = 32
    """Prompts of one request times `n`."""
    texts_per_request: Positive = 2048
    """Texts of one request for embeddings (OpenAI's number)."""
    answer_tokens: Positive = 32768
    """Tokens one answer may be asked to have."""
    chat_answer_tokens: Positive = 4096
    """Tokens of a chat answer where the client names no number."""
    request_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Seconds from the request to the last token, waiting included."""
    shutdown_seconds: NonNegative = 30
    """Seconds that answers in progress have when the server is told to stop."""

    def for_pictures(self) -> RequestLimits:
        """Those of a server whose model may be shown some."""
        return self.model_copy(update={"body_bytes": max(self.body_bytes, self.body_bytes_with_pictures)})
