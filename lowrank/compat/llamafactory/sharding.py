"""Whether DeepSpeed, FSDP or accelerate would cut a file's model over the devices, and so whether `base: sharded` does.

ZeRO-3 and FSDP's full shard cut the parameters; ZeRO-1 and -2 and `shard_grad_op` cut gradients and the optimizer's
state, of which a frozen base has none, so they are `base: replicated` here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lowrank.compat.llamafactory.dataset_info import places_of
from lowrank.compat.llamafactory.devices import devices_of
from lowrank.compat.llamafactory.keys import Keys
from lowrank.foreign_files import find_json

_CUTS = ("full_shard", "hybrid_shard", "1", "4")
"""FSDP's strategies that cut parameters, by name and by accelerate's number."""
_WHOLE = "every device holds the whole base, which has no gradients and no optimizer state to shard"


def sharding(keys: Keys, folder: Path, environment: Mapping[str, str] = os.environ) -> tuple[dict[str, str], list[str]]:
    """The native `base`, if it is not replicated, and a line for every key that asks for one or the other."""
    lines: list[str] = []
    requests = list(_requests(keys, folder, environment, lines))
    lines += [f"{each.key}: {_WHOLE} (quantization_bit: 4 makes it a quarter)" for each in requests if not each.cuts]
    cuts = [each for each in requests if each.cuts]
    if not cuts:
        return {}, lines
    names = ", ".join(each.key for each in cuts)
    offloads = any(each.offloads for each in cuts)
    obstacle = _obstacle(keys)
    if obstacle:
        return {}, [*lines, f"{names}: every device holds the whole base, since {obstacle}"]
    if devices_of(environment) == 1:
        way = "base: streamed keeps it in host memory" if offloads else "quantization_bit: 4 makes it a quarter"
        return {}, [*lines, f"{names}: there is one device to cut the base over, which holds the whole of it ({way})"]
    base = "sharded_offload" if offloads and torch.cuda.is_available() else "sharded"
    way = "base: replicated is faster where it fits on each device (`lowrank plan` says so)"
    return {"base": base}, [*lines, f"{names}: the devices hold the base in parts, as base: {base} says; {way}"]


class _Request(NamedTuple):
    """What asks for sharding, whether it cuts parameters, and whether these are to wait in host memory."""

    key: str
    cuts: bool
    offloads: bool


def _requests(keys: Keys, folder: Path, environment: Mapping[str, str], lines: list[str]) -> Iterator[_Request]:
    """`lines` gets what cannot be read."""
    if keys.deepspeed is not None:
        configuration = _configuration("deepspeed", keys.deepspeed, folder, lines)
        if configuration is not None:
            yield _deepspeed(configuration)
    if keys.fsdp_config and not keys.fsdp:
        lines.append("fsdp_config has no effect without fsdp")
    if keys.fsdp:
        yield _fsdp(keys.fsdp, _configuration("fsdp_config", keys.fsdp_config or {}, folder, lines) or {})
    if _yes(environment.get("ACCELERATE_USE_FSDP")):  # `accelerate launch --config_file`
        strategy = environment.get("FSDP_SHARDING_STRATEGY", "full_shard").lower()
        if environment.get("FSDP_VERSION", "1") == "2":
            strategy = "full_shard" if _yes(environment.get("FSDP_RESHARD_AFTER_FORWARD", "true")) else "shard_grad_op"
        yield _Request("accelerate's FSDP", strategy in _CUTS, _yes(environment.get("FSDP_OFFLOAD_PARAMS")))
    if _yes(environment.get("ACCELERATE_USE_DEEPSPEED")):
        offloads = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none") != "none"
        yield _Request("accelerate's DeepSpeed", environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3", offloads)


def _deepspeed(configuration: Mapping[str, Any]) -> _Request:
    zero = configuration.get("zero_optimization")
    zero = zero if isinstance(zero, Mapping) else {}
    offload = zero.get("offload_param")
    offloads = isinstance(offload, Mapping) and offload.get("device", "none") != "none"
    return _Request("deepspeed", str(zero.get("stage")) == "3", offloads)


def _fsdp(options: bool | tuple[str, ...], configuration: Mapping[str, Any]) -> _Request:
    """transformers' `fsdp` (true, or `full_shard auto_wrap offload`) and its `fsdp_config`."""
    # names in the configuration stand there with and without accelerate's prefix
    settings = {str(name).removeprefix("fsdp_"): str(value).lower() for name, value in configuration.items()}
    names = [name.lower() for name in options] if isinstance(options, tuple) else []
    strategies = {*names, settings.get("sharding_strategy"), settings.get("reshard_after_forward")}
    return _Request(
        "fsdp",
        not strategies & {"no_shard", "shard_grad_op", "hybrid_shard_zero2", "2", "3", "5", "false"},
        "offload" in names or settings.get("offload_params") == "true",
    )


def _configuration(key: str, given: Any, folder: Path, lines: list[str]) -> Mapping[str, Any] | None:
    """A mapping, or what is in the JSON file of that name, which is looked for as a dataset_dir is."""
    if isinstance(given, Mapping):
        return given
    found = next((each for place in places_of(str(given), folder) if (each := find_json(place)) is not None), None)
    if found is None:
        lines.append(f"{key}: {given} cannot be read here; {_WHOLE}, unless base: sharded is set")
    return found


def _obstacle(keys: Keys) -> str | None:
    if keys.finetuning_type in ("full", "freeze"):
        return f"finetuning_type: {keys.finetuning_type} trains the base itself, which must fit on one"
    if keys.stage == "ppo" or keys.predict_with_generate:
        return "a base in parts cannot answer while it trains"
    if keys.additional_target or keys.use_asft_loss or keys.use_eaft_loss:
        return "additional_target, use_asft_loss and use_eaft_loss read the whole head"
    return None


def _yes(value: str | None) -> bool:
    return (value or "").lower() in ("1", "true", "yes", "y", "on")
