"""Other programs' names for spreading a model are refused with the reason and a way out, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank.config.refused_parallelism import why_refused
from lowrank.config.schema import RunConfig
from tests.config.test_problems import TOP, problems


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"tensor_parallel": 2}, "tensor_parallel: tensor parallelism reduces all activations"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size: tensor parallelism"),
        ({"tp_size": 2}, "tp_size: tensor parallelism"),
        ({"pipeline_parallel_size": 4}, "pipeline_parallel_size: a pipeline fills bubbles"),
        ({"expert_parallelism": 4}, "expert_parallelism: experts on devices of their own"),
        ({"sequence_parallel_size": 4}, "sequence_parallel_size: a document is not cut over devices"),
        ({"parallelism": "tensor"}, "parallelism: tensor parallelism"),
        ({"parallelism": "ulysses"}, "parallelism: a document is not cut"),
        ({"deepspeed": "z3.json"}, "deepspeed: it is deepspeed's, which lowrank does not need"),
    ],
)
def test_the_reason_and_the_way_out(given: dict[str, Any], reason: str) -> None:
    (line,) = problems({**TOP, **given})
    assert line.startswith(reason)
    assert "base: sharded" in line or "data.max_length" in line


def test_settings_of_ours_and_typos_are_not_taken_for_them() -> None:
    assert [name for name in RunConfig.model_fields if why_refused(name)] == []
    assert why_refused("context_size") is None, "of one document, not of devices"
    assert why_refused("cp_size") is not None
    assert problems({**TOP, "parallelism": "date"}) == [
        "parallelism: expected 'auto', 'jobs' or 'data', got 'date'; did you mean 'data'?"
    ]
    assert problems({**TOP, "batch_size": 2}) == ["batch_size: unknown key; did you mean 'data.batch_size'?"]
