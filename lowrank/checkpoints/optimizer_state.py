"""The state of a torch optimizer as named tensors: `<parameter>.exp_avg`, `<parameter>.exp_avg_sq`, `<parameter>.step`.

By name, not by torch's running number, so that a file says what it holds and cannot be restored onto the
wrong parameters. Numbers that are no tensors are kept as scalars named `<key>:int` and `<key>:float`; what an optimizer
counts for a whole group (schedule-free) as `group <i>.<key>`. Hyperparameters are not in it: they are settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lowrank.errors import OutputError, raise_all

_OF_GROUPS = ("k", "weight_sum", "lr_max", "taken")
"""Counters of groups: schedulefree's, and BAdam's."""
_LIKE_PARAMETERS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""State that is as large as its parameter in these:"""
_ELEMENTWISE = (torch.optim.AdamW, torch.optim.SGD)


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The state of `optimizer` over `parameters` (all it has, by name). Empty before its first step."""
    _same_parameters(optimizer, parameters)
    flat: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:  # SGD without momentum keeps an empty place for it
                flat.update([_as_tensor(f"{name}.{key}", value)])
    for index, key, value in _group_counters(optimizer):
        flat.update([_as_tensor(f"group {index}.{key}", value)])
    return flat


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Put back, to the bit, what `flatten_optimizer` gave, into a fresh optimizer over the same parameters.

    The optimizer takes over `tensors` and will change them: large ones are not copied where they fit as they are.
    Raises OutputError with every tensor that belongs to no parameter or has another shape.
    """
    _same_parameters(optimizer, parameters)
    problems: list[str] = []
    by_name: dict[str, dict[str, Any]] = {}
    groups = {f"group {index}": group for index, group in enumerate(optimizer.param_groups)}
    for flat_name, value in tensors.items():
        name, _, key = flat_name.rpartition(".")
        if name in groups:
            groups[name].update([_from_tensor(key, value)])
        elif name not in parameters:
            problems.append(f"{flat_name}: there is no parameter {name!r}")
        elif _misshapen(optimizer, key, value, parameters[name]):
            problems.append(f"{flat_name}: shape {tuple(value.shape)}, expected {tuple(parameters[name].shape)}")
        else:
            by_name.setdefault(name, {}).update([_from_tensor(key, value)])
    if isinstance(optimizer, _ELEMENTWISE):
        kinds = {key for state in by_name.values() for key in state}
        problems += [f"{name}.{key}: missing" for name, own in by_name.items() for key in sorted(kinds - set(own))]
    raise_all(OutputError, "the optimizer state does not fit the job", problems)
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {index: by_name[name_of[id(each)]] for index, each in enumerate(ordered) if name_of[id(each)] in by_name}
    # torch puts the tensors on the parameters' device
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _group_counters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, str, Any]]:
    for index, group in enumerate(optimizer.param_groups):
        yield from ((index, key, group[key]) for key in _OF_GROUPS if key in group)


def _as_tensor(name: str, value: Any) -> tuple[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return name, value.detach()
    assert isinstance(value, (int, float)), f"{name} is a {type(value)}"
    kind = "int" if isinstance(value, int) else "float"
    return f"{name}:{kind}", torch.tensor(value, dtype=torch.int64 if kind == "int" else torch.float64)


def _from_tensor(key: str, value: torch.Tensor) -> tuple[str, Any]:
    name, _, kind = key.partition(":")
    return name, value.item() if kind else value


def _misshapen(optimizer: torch.optim.Optimizer, key: str, value: torch.Tensor, parameter: torch.nn.Parameter) -> bool:
    elementwise = isinstance(optimizer, _ELEMENTWISE) and key in _LIKE_PARAMETERS
    return elementwise and value.shape != parameter.shape


def _same_parameters(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert own == {id(parameter) for parameter in parameters.values()}, "not the optimizer of these parameters"
