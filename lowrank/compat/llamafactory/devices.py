"""On how many devices LLaMA-Factory would train a file here, and what becomes of that: its step grows with them.

It starts torchrun by itself where more than one GPU is visible, or with FORCE_TORCHRUN=1 (its launcher.py), and each
process takes `per_device_train_batch_size * gradient_accumulation_steps` samples of a step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from lowrank.ranks import processes_here

_YES = ("1", "true", "y", "yes", "on")


def devices_of(environment: Mapping[str, str] = os.environ) -> int:
    """Processes of one machine, or all that torchrun has started."""
    started = processes_here(environment)
    if started > 1:
        return started
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if visible > 1 or environment.get("FORCE_TORCHRUN", "").lower() in _YES:
        given = environment.get("NPROC_PER_NODE", "")
        return max(1, int(given) if given.isdecimal() else visible)
    return 1


def spread(samples: int, environment: Mapping[str, str] = os.environ) -> tuple[int, int | str, str | None]:
    """Samples of a step there, `devices` here, and a line that says so; None where there is one device."""
    number = devices_of(environment)
    if number == 1:
        return samples, 1, None
    # ours are a power of two, so that the results are the same bits on any number of them
    ours = 1 << (number.bit_length() - 1)
    step = samples * number
    text = (
        f"on the {number} devices that LLaMA-Factory would use here its step holds {samples} x {number} = {step} "
        f"samples, and so it does here, with devices: {ours}"
    )
    if ours != number:
        text += f" (a power of two; {number - ours} of them are not used)"
    return step, 1 if processes_here(environment) > 1 else ours, text + " (docs/distributed.md)"
