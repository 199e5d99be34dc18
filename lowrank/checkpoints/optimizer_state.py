"""The state of a torch optimiser as named tensors: `<parameter>.exp_avg`, `<parameter>.exp_avg_sq`, `<parameter>.step`.

By name, not by torch's running number, so that a file says what it holds and cannot be restored onto the
wrong parameters. Hyperparameters are not in it: they are settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lowrank.errors import OutputError, raise_all


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The state of `optimizer` over `parameters` (all it has, by name). Empty before its first step."""
    _same_parameters(optimizer, parameters)
    flat: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is None:  # SGD without momentum keeps an empty place for it
                continue
            assert isinstance(value, torch.Tensor), f"{type(optimizer).__name__} keeps {key} as {type(value)}"
            flat[f"{name}.{key}"] = value.detach()
    return flat


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Put back, to the bit, what `flatten_optimizer` gave, into a fresh optimiser over the same parameters.

    The optimiser takes over `tensors` and will change them: large ones are not copied where they fit as they are.
    Raises OutputError with every tensor that belongs to no parameter or has another shape.
    """
    _same_parameters(optimizer, parameters)
    problems: list[str] = []
    by_name: dict[str, dict[str, Any]] = {}
    for flat_name, value in tensors.items():
        name, _, key = flat_name.rpartition(".")
        if name not in parameters:
            problems.append(f"{flat_name}: there is no parameter {name!r}")
        elif value.ndim and value.shape != parameters[name].shape:
            problems.append(f"{flat_name}: shape {tuple(value.shape)}, expected {tuple(parameters[name].shape)}")
        else:
            by_name.setdefault(name, {})[key] = value
    kinds = {key for state in by_name.values() for key in state}
    problems += [f"{name}.{key}: missing" for name, own in by_name.items() for key in sorted(kinds - set(own))]
    raise_all(OutputError, "the optimiser state does not fit the job", problems)
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {index: by_name[name_of[id(each)]] for index, each in enumerate(ordered) if name_of[id(each)] in by_name}
    # torch puts the tensors on the parameters' device
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _same_parameters(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert own == {id(parameter) for parameter in parameters.values()}, "not the optimiser of these parameters"
