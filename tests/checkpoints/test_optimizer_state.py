"""An optimizer goes on from a file as if it had never stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowrank.checkpoints.optimizer_state import flatten_optimizer, restore_optimizer
from lowrank.checkpoints.tensor_file import read_tensors, write_tensors
from lowrank.errors import OutputError
from lowrank.train.optimizers.adamw import AdamWConfig
from lowrank.train.optimizers.sgd import SGDConfig

Parameters = dict[str, torch.nn.Parameter]
Build = Callable[[Parameters], torch.optim.Optimizer]


def fresh(dtype: torch.dtype = torch.float32) -> Parameters:
    generator = torch.Generator().manual_seed(0)
    shapes = {"b.lora_A.weight": (4, 8), "a.lora_B.weight": (8, 4), "norm.weight": (8,), "scalar": (1,)}
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for name, shape in shapes.items()
    }


def train(parameters: Parameters, optimizer: torch.optim.Optimizer, first: int, end: int) -> None:
    for step in range(first, end):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in parameters.items():
            # one of them gets no gradient before step 3: it has no state until then
            parameter.grad = (
                None
                if name == "norm.weight" and step < 3
                else torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            )
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.step()


BUILDS: dict[str, Build] = {
    "adamw": lambda parameters: AdamWConfig(weight_decay=0.1).build(parameters),
    "sgd": lambda parameters: SGDConfig().build(parameters),
    "momentum": lambda parameters: torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters.values(), amsgrad=True, foreach=True),
    "groups": lambda parameters: torch.optim.AdamW(
        [{"params": [each], "weight_decay": index / 10} for index, each in enumerate(reversed(parameters.values()))]
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stopped_at", [0, 2, 5])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_resumed_equals_uninterrupted_to_the_bit(
    build: Build, stopped_at: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    whole = fresh(dtype)
    train(whole, build(whole), 0, 8)
    first = fresh(dtype)
    optimizer = build(first)
    train(first, optimizer, 0, stopped_at)
    write_tensors(tmp_path / "optimizer", flatten_optimizer(optimizer, first))
    write_tensors(tmp_path / "parameters", first)
    second = {name: torch.nn.Parameter(value) for name, value in read_tensors(tmp_path / "parameters").items()}
    second = {name: second[name] for name in first}
    resumed = build(second)
    restore_optimizer(resumed, second, read_tensors(tmp_path / "optimizer"))
    train(second, resumed, stopped_at, 8)
    for name, value in whole.items():
        assert torch.equal(second[name], value), name


def test_state_is_found_by_name_not_by_place() -> None:
    parameters = fresh()
    optimizer = BUILDS["adamw"](parameters)
    train(parameters, optimizer, 0, 4)
    flat = flatten_optimizer(optimizer, parameters)
    assert {name.rpartition(".")[2] for name in flat} == {"step", "exp_avg", "exp_avg_sq"}
    turned = dict(reversed(fresh().items()))
    other = BUILDS["adamw"](turned)
    restore_optimizer(other, turned, flat)
    for name, parameter in parameters.items():
        assert torch.equal(other.state[turned[name]]["exp_avg"], optimizer.state[parameter]["exp_avg"])


def test_everything_that_does_not_fit_is_named_at_once() -> None:
    parameters = fresh()
    optimizer = BUILDS["adamw"](parameters)
    train(parameters, optimizer, 0, 4)
    flat = flatten_optimizer(optimizer, parameters)
    flat["gone.exp_avg"] = torch.zeros(2)
    flat["scalar.exp_avg"] = torch.zeros(3)
    del flat["norm.weight.exp_avg_sq"]
    other = fresh()
    with pytest.raises(OutputError) as caught:
        restore_optimizer(BUILDS["adamw"](other), other, flat)
    for problem in (
        "no parameter 'gone'",
        "scalar.exp_avg: shape (3,), expected (1,)",
        "norm.weight.exp_avg_sq: missing",
    ):
        assert problem in str(caught.value)
