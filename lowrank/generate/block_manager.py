"""The block manager of the paged KV cache: which page belongs to whom, and automatic prefix caching (APC).

A page has users (sequences that read it). A full page is known by a digest of everything that decided what
is in it: the adapter, its version, and all tokens from the start of the text. Another sequence with the same
beginning and the same adapter version finds it by that digest and does not compute it again; one with
another version never can. Pages nobody uses stay known until the room is needed, the longest unused first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from lowrank.segments import Media


class BlockManager:
    """Pages 1 to `num_pages` - 1; page 0 is nobody's (models/attention/paged.py)."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.capacity = num_pages - 1
        self._free = list(range(num_pages - 1, 0, -1))
        self._users = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that can be taken now."""
        return len(self._free) + len(self._idle)

    def take(self) -> int:
        """A page for new tokens; there must be one `available`."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
        self._users[page] = 1
        return page

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """The longest known beginning of a text: its pages, with one user more."""
        found = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            self._users[page] += 1
            self._idle.pop(page, None)
            found.append(page)
        return found

    def register(self, page: int, digest: bytes) -> None:
        """A page is full, and may be found from now on."""
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest], self._digest_of[page] = page, digest

    def release(self, pages: Sequence[int]) -> None:
        """One user less of each; the last pages of a text are the first to be given to others."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._digest_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)


def root_digest(slot: int, version: int, media: Media | None = None) -> bytes:
    """Where the texts of one adapter version begin; those with pictures begin with these, since equal placeholders may
    stand for different ones."""
    seen = "" if media is None else ":".join(picture.digest for picture in media.items)
    return f"{slot}:{version}:{seen}".encode()


def next_digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """Of a page that follows a page."""
    return hashlib.blake2b(before + np.asarray(tokens, np.int64).tobytes(), digest_size=16).digest()
