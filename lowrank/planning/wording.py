"""A plan in words."""

from __future__ import annotations

from lowrank.planning.plan import Plan

_RECOMPUTE = {
    "none": "activations are kept",
    "selective": "layers are computed again, but for their attention",
    "full": "layers are computed again",
    "sqrt": "layers are computed up to twice again",
    "offload": "activations go to host memory",
}


def gigabytes(size: float) -> str:
    """`3.1 GB`, `640 MB` (powers of ten)."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def recompute_in_words(recompute: str | int) -> str:
    """What a policy does."""
    return f"the first {recompute} layers are computed again" if isinstance(recompute, int) else _RECOMPUTE[recompute]


def one_line(plan: Plan) -> str:
    """What a run says before it loads."""
    where = "memory" if plan.device == "cpu" else f"memory of {plan.device}"
    return (
        f"needs about {gigabytes(plan.peak)} of {gigabytes(plan.available)} free {where}; forward passes of up to "
        f"{plan.micro_batch_tokens:,} tokens, {recompute_in_words(plan.recompute)}"
    )


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
