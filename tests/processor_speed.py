"""How fast this machine is beside the one that limits of processor time were found on."""

from __future__ import annotations

import json
import time

_THERE = 0.05
"""Processor seconds of the work below on an EPYC (family 25, model 17) with nothing beside it."""
_VALUE = [{"step": number, "loss": number / 7, "name": f"job {number}"} for number in range(2000)]


def slowness() -> float:
    """How many times as long the same Python takes here, now; at least 1."""
    return max(1.0, min(_seconds() for _ in range(3)) / _THERE)


def _seconds() -> float:
    start = time.process_time()
    for _ in range(10):
        json.loads(json.dumps(_VALUE))
    return time.process_time() - start
