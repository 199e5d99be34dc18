"""What experiment trackers are sent."""

from __future__ import annotations

from lowrank.report.events import EvalDone, Event, StepDone


def scalars(event: Event) -> dict[str, float]:
    """Named numbers of a logged or skipped step (`train/...`) or an evaluation (`eval/...`); of others, none."""
    if isinstance(event, EvalDone):
        return {f"eval/{name}": value for name, value in ({"loss": event.loss} | event.metrics).items()}
    if not isinstance(event, StepDone) or not (event.logged or event.skipped):
        return {}
    numbers = {name: getattr(event, name) for name in ("loss", "grad_norm", "learning_rate", "epoch")}
    return {f"train/{name}": value for name, value in (numbers | event.metrics).items()}
