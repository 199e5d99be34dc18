"""The benchmark is fair: both sides see the same tokens and losses."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    contender_jobs,
    contender_lowrank,
    contender_trl,
    jobs_in_one_process,
    machine,
    train_vs_trl,
    workload,
)

SHAPE = {"vocab_size": 8192, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> workload.Workload:
    return workload.prepare(tmp_path_factory.mktemp("workload"), None, 24, SHAPE)


def spec_of(work: workload.Workload, steps: list[list[int]], **more: Any) -> dict[str, Any]:
    return {"folder": str(work.folder), "device": "cpu", "rank": 4, "learning_rate": 1e-3, "steps": steps, **more}


def test_what_was_prepared_is_what_is_read(work: workload.Workload) -> None:
    assert workload.read(work.folder) == work
    assert {len(row.tokens) == len(row.learned) and any(row.learned) for row in work.rows} == {True}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "default"])
def test_both_sides_lose_the_same(work: workload.Workload, packed: bool) -> None:
    steps = work.batched(4)[:3]
    ours = contender_lowrank.main(spec_of(work, steps, micro_batch_tokens=4096, keep_freed_memory=False))
    arguments = {**train_vs_trl.TRL_PACKED, "max_length": 4096} if packed else {"per_device_train_batch_size": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = contender_trl.main(spec_of(work, steps, packed=packed, arguments=arguments))
    for one, other in zip(ours["steps"], theirs["steps"]):
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.3)  # other random adapters
    train_vs_trl.check("ours", ours["steps"])


def test_a_run_that_learns_nothing_is_no_result() -> None:
    with pytest.raises(SystemExit, match="gradient norm 0"):
        train_vs_trl.check("theirs", [{"loss": 1.0, "grad_norm": 0.0}])
    with pytest.raises(SystemExit, match="did not fall"):
        train_vs_trl.check("theirs", [{"loss": 1.0, "grad_norm": 1.0}] * 4)


def test_jobs_are_given_their_own_rows(work: workload.Workload) -> None:
    jobs = {str(job): jobs_in_one_process.steps_of(work, job, 2, 1024, 2) for job in range(2)}
    assert not {row for step in jobs["0"] for row in step} & {row for step in jobs["1"] for row in step}
    spec = {"folder": str(work.folder), "device": "cpu", "rank": 4, "learning_rate": 1e-3, "micro_batch_tokens": 4096}
    together = contender_jobs.main({**spec, "jobs": jobs})
    alone = [contender_jobs.main({**spec, "jobs": {seed: steps}}) for seed, steps in jobs.items()]
    whole = [{**each, "whole_seconds": 1.0} for each in (together, *alone)]
    assert jobs_in_one_process.compare(whole[0], whole[1:])["largest_difference_of_a_loss"] < 2e-3


def test_the_steps_of_contenders_are_the_same(work: workload.Workload) -> None:
    options = train_vs_trl.options_of(["--steps", "2", "--tokens", "512"])
    specs = train_vs_trl.contenders(work, options)
    assert specs["lowrank"]["steps"] == specs["trl_packed"]["steps"]
    assert specs["lowrank_same_rows"]["steps"] == specs["trl_default"]["steps"]
    assert Path(options.results).name == "results"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_sides_compute_in_one_dtype(work: workload.Workload, dtype: str) -> None:
    """A processor without bf16 emulates it, on either side."""
    specs = train_vs_trl.contenders(work, train_vs_trl.options_of(["--dtype", dtype, "--tokens", "1024"]))
    packed, default = (specs[name]["arguments"] for name in ("trl_packed", "trl_default"))
    assert packed["model_init_kwargs"]["dtype"] == dtype
    assert packed["bf16"] is (dtype == "bfloat16")
    assert default.get("bf16", True) is (dtype == "bfloat16")


def test_auto_is_what_lowrank_takes_here() -> None:
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    assert train_vs_trl.options_of([]).dtype == ("bfloat16" if fast else "float32")


def test_measuring_a_product_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one takes minutes, it is measured at fewer rows, and seldom."""
    calls: list[int] = []

    def slow(x_ND: torch.Tensor, weight_OD: torch.Tensor) -> torch.Tensor:
        calls.append(len(x_ND))
        time.sleep(1e-3 * len(x_ND))
        return x_ND @ weight_OD.t()

    monkeypatch.setattr(machine.F, "linear", slow)
    monkeypatch.setattr(machine, "_MOST", 0.2)
    limit = machine.gemm_limit({(8, 8): 1}, 4096, "cpu", times=2, dtype=torch.float32)
    assert limit["flops_per_second"] > 0
    assert max(calls) < 100
    calls.clear()
    machine.seconds_of(lambda: calls.append(time.sleep(0.02) or 1), "cpu", 1000, most=0.05)
    assert len(calls) < 5
