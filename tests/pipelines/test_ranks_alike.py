"""Ranks that would train different things: noticed before the first step, and later by their adapters."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank.config import RunConfig
from lowrank.errors import ConfigError, ModelError
from lowrank.pipelines import rank_agreement
from lowrank.pipelines.adapter_desync import COMPARED_EVERY, AdapterDesyncCheck
from lowrank.pipelines.rank_agreement import refuse_rank_differences
from tests.train.rank_threads import ThreadRank, on_ranks

OWN = threading.local()
"""What this rank's thread finds."""


def compared(monkeypatch: pytest.MonkeyPatch, *found: dict[str, Any]) -> list[str]:
    """The warnings of ranks whose machines are found to be so."""
    usual = {"torch": "2.13.0", "device": "cpu", "dtype": torch.bfloat16, "gpu": None}
    known = {"lowrank": "1", "transformers": "5"}
    monkeypatch.setattr(rank_agreement, "versions", lambda: {**known, "torch": OWN.found["torch"]})
    monkeypatch.setattr(rank_agreement, "choose_device", lambda model: torch.device(OWN.found["device"]))
    monkeypatch.setattr(rank_agreement, "choose_dtype", lambda model, device: OWN.found["dtype"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: OWN.found["gpu"])
    warnings: list[str] = []

    def work(ranks: ThreadRank) -> None:
        OWN.found = {**usual, **found[ranks.rank]}
        given: Any = {"model": {"path": "m"}, "data": {"train": ["d"]}, "output_dir": "o"}
        refuse_rank_differences(RunConfig(**given), [], ranks, warnings.append)

    on_ranks(len(found), work)
    return warnings


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"torch": "2.12.1"}, r"rank 1 on .*: torch is 2\.12\.1, on rank 0 2\.13\.0"),
        ({"device": "cuda", "gpu": "T4"}, r"rank 1 on .*: model\.device is cuda, on rank 0 cpu"),
        ({"dtype": torch.float16}, r"rank 1 on .*: model\.dtype is torch\.float16, on rank 0 torch\.bfloat16"),
    ],
)
def test_another_library_device_or_dtype_is_named(
    monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], difference: str
) -> None:
    assert compared(monkeypatch, {}, {}) == []
    with pytest.raises(ConfigError, match=difference):
        compared(monkeypatch, {}, other)


def test_gpus_of_two_kinds_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [{"device": "cuda", "gpu": name} for name in ("RTX 3090", "RTX 4090")]
    warnings = compared(monkeypatch, *kinds)
    assert all("computes on RTX 4090, rank 0 on RTX 3090" in each for each in warnings)
    assert warnings
    assert compared(monkeypatch, kinds[0], kinds[0]) == []


def test_adapters_are_compared_before_the_first_step_and_every_hundred() -> None:
    """One bit of one weight, on one rank."""

    def work(ranks: ThreadRank) -> list[int]:
        weight = torch.nn.Parameter(torch.ones(3))
        jobs = {2: SimpleNamespace(parameters={"A": weight})}
        engine = SimpleNamespace(lanes=SimpleNamespace(ranks=ranks), jobs=jobs)
        check = AdapterDesyncCheck(engine)  # type: ignore[arg-type]
        looked = []
        for iteration in range(7, 2 * COMPARED_EVERY + 1):
            if iteration == COMPARED_EVERY + 50 and ranks.rank == 1:
                weight.data[1] = torch.nextafter(weight.data[1], torch.tensor(2.0))
            before = ranks.exchanges
            if iteration == 2 * COMPARED_EVERY:
                with pytest.raises(ModelError, match=r"(?s)after step 200 the ranks' adapters.*rank 1 on .* of slot 2"):
                    check.before_step(iteration)
            else:
                check.before_step(iteration)
            looked += [iteration] * (ranks.exchanges - before)
        return looked

    assert on_ranks(2, work) == [[7, COMPARED_EVERY, 2 * COMPARED_EVERY]] * 2


def test_settings_are_compared_but_for_where_things_lie(tmp_path: Path) -> None:
    def work(ranks: ThreadRank) -> None:
        place = {"path": f"m{ranks.rank}", "device": "cpu"}
        given: Any = {"model": place, "data": {"train": [f"d{ranks.rank}"]}, "output_dir": f"{tmp_path}/{ranks.rank}"}
        refuse_rank_differences(RunConfig(**given), [], ranks)
        changed = {**given, "optimizer": {"learning_rate": 0.1 + ranks.rank}}
        refuse_rank_differences(RunConfig(**changed), [], ranks)

    with pytest.raises(ConfigError, match=r"rank 1 on .*learning_rate is 1\.1, on rank 0 0\.1"):
        on_ranks(2, work)
