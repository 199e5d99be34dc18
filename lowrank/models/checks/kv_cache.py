"""The KV-cache check every base passes before it generates: a text read in pieces must give what it gives whole.

As with leaks (models/checks/isolation.py), the loaded model itself is asked, with a few tokens. A family that keeps
something else between tokens than keys and values (a convolution, a recurrent state), or keeps them elsewhere,
fails and is served by transformers' own `generate`.
"""

from __future__ import annotations

import contextlib

import torch

from lowrank.errors import ModelError
from lowrank.kernels.accelerators import wide
from lowrank.models.attention.packed import BoundariesMissing
from lowrank.models.attention.paged import KVCache, PagedBatch, SequenceChunk
from lowrank.models.base import Base
from lowrank.models.checks.isolation import (
    MODEL_ERRORS,
    distance,
    hidden_alone,
    narrow_windows,
    one_token_at_a_time,
    random_documents,
    tolerance,
)

_PAGE = 2
_PIECES = ((4, 2, 5), (2, 1, 0), (1, 8, 0), (0, 1, 0))
"""New tokens of each of three documents in each step: starts, pieces and single tokens side by side."""


def known_kv_cache_mismatch(base: Base) -> str | None:
    """As `kv_cache_mismatch`, of which each base is asked once: it reads every weight seven times, and evaluations come
    and go."""
    kind = (base.layout, base.prompt_type, base.layer_wrapper is None)
    if kind not in base.kv_cache_mismatches:
        base.kv_cache_mismatches[kind] = kv_cache_mismatch(base)
    return base.kv_cache_mismatches[kind]


def kv_cache_mismatch(base: Base) -> str | None:
    """None if the model can go on from pages, else what happened, in words."""
    if base.layout != "packed":
        return "its attention does not receive the boundaries of sequences"
    if base.prompt_type is not None:
        return "it reads a question both ways, hence as a whole, and not piece by piece"
    documents = random_documents(base, 0)
    try:
        wrapper = base.layer_wrapper
        reproducible = contextlib.nullcontext() if wrapper is None else wrapper.reproducible()
        with torch.no_grad(), narrow_windows(base.model), one_token_at_a_time(base), reproducible:
            pieces = _in_pieces(base, documents)
            whole = [hidden_alone(base, document) for document in documents]
    except BoundariesMissing:
        return "its attention does not receive the boundaries of sequences"
    except ModelError as error:
        return str(error)
    except MODEL_ERRORS as error:
        return f"it does not run so ({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''})"
    apart = max(distance(one, other) for one, other in zip(pieces, whole))
    return (
        None if apart <= tolerance(base) else f"a text read in pieces gives another result than whole (by {apart:.1e})"
    )


def _in_pieces(base: Base, documents: list[torch.Tensor]) -> list[torch.Tensor]:
    """The hidden states of documents that are read a few tokens at a time, side by side."""
    cache = KVCache(num_pages=1 + 3 * 8, page_size=_PAGE)
    tables = [list(range(1 + 8 * index, 9 + 8 * index)) for index in range(3)]
    read = [0, 0, 0]
    found: list[list[torch.Tensor]] = [[], [], []]
    for lengths in _PIECES:
        members = [index for index in range(3) if lengths[index]]
        spans = [
            SequenceChunk(read[i], lengths[i], tables[i], fresh=tables[i] if read[i] == 0 else ()) for i in members
        ]
        token_T = torch.cat([documents[i][read[i] : read[i] + lengths[i]] for i in members]).to(base.device)
        hidden_TD = wide(base.forward_with_kv_cache(token_T, PagedBatch(cache, spans, base.device)))
        for i, piece in zip(members, hidden_TD.split([span.length for span in spans])):
            found[i].append(piece)
            read[i] += len(piece)
    assert read == [len(document) for document in documents]
    return [torch.cat(pieces) for pieces in found]
