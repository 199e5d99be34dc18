"""What a CPU in 16 bits keeps of compiled products, which are more with every number of rows it has not seen
(kernels/shape_bucketing.py): a run of steps of many lengths grows by that over its first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from lowrank.kernels.shape_bucketing import bucketed_rows
from lowrank.planning.simulation import PlannedJob

_BYTES = 720 << 10
"""Of one product: torch's description of it and oneDNN's, and its code. Measured (docs/log.md)."""
_OF_BASE, _OF_ADAPTER = 10, 15
"""Products of the base for each number of rows of a pass, and of one rank of adapters for each of a slot."""
_MOST = 1024
"""That oneDNN keeps."""


def growth(jobs: Sequence[PlannedJob], micro_batch_tokens: int) -> int:
    """Bytes by which a run grows after its first step."""
    together = zip_longest(*(job.tokens_of_steps for job in jobs), fillvalue=0)
    passes = {_last_pass(sum(step), micro_batch_tokens) for step in together}
    by_rank: dict[int, set[int]] = {}
    for job in jobs:
        if job.adapter is not None:
            own = by_rank.setdefault(getattr(job.adapter, "rank", 0), set())
            own |= {_last_pass(tokens, micro_batch_tokens) for tokens in job.tokens_of_steps}
    more = _OF_BASE * max(0, len(passes) - 1) + _OF_ADAPTER * sum(max(0, len(own) - 1) for own in by_rank.values())
    return _BYTES * min(_MOST, more)


def _last_pass(tokens: int, micro_batch_tokens: int) -> int:
    """Rows of what is left for it; the passes before it are about full."""
    return bucketed_rows((tokens - 1) % micro_batch_tokens + 1)
