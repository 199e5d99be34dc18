"""The numbers of a config.json, before anything is built of them: whole, above zero, and of a size that models have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lowrank.errors import ModelError, raise_all
from lowrank.models.loading.checkpoint_files import checkpoint_files, stored_tensors

LARGEST = {
    "hidden_size": 1 << 17,
    "n_embd": 1 << 17,
    "d_model": 1 << 17,
    "intermediate_size": 1 << 20,
    "moe_intermediate_size": 1 << 20,
    "ffn_dim": 1 << 20,
    "num_hidden_layers": 2000,
    "n_layer": 2000,
    "num_attention_heads": 4096,
    "n_head": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 24,
    "num_experts": 1 << 13,
    "num_local_experts": 1 << 13,
    "n_routed_experts": 1 << 13,
    "num_experts_per_tok": 1 << 13,
    "max_position_embeddings": 1 << 31,
    "n_positions": 1 << 31,
}
"""The largest value of each that is not a mistake or an attack: some ten times that of any model so far."""
MAY_BE_ZERO = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")


def check_numbers(config: Mapping[str, Any], where: str) -> None:
    """ModelError that lists all invalid numbers of a config.json. `where`: the file's name."""
    problems = _problems(config, "")
    for part in _PARTS:
        if isinstance(config.get(part), Mapping):
            problems += _problems(config[part], f"{part}.")
    raise_all(ModelError, f"{where}: invalid model config", problems)


def check_stored(path: str, revision: str | None, config: Any) -> None:
    """ModelError where a configuration (transformers') is of a model far larger than its files, or these are damaged:
    what is missing would be made up in memory before it is missed."""
    stored = stored_tensors(checkpoint_files(path, revision))
    text = config.get_text_config()
    names = ("hidden_size", "vocab_size", "num_hidden_layers")
    sizes = [size for name in names if isinstance(size := getattr(text, name, None), int)]
    if len(sizes) < len(names):
        return
    hidden, vocabulary, layers = sizes
    least = hidden * vocabulary + layers * hidden * hidden
    held = sum(tensor.nbytes for tensor in stored.values())
    if least > 10 * held + 10_000_000:  # one bit a weight is 8 of them a byte
        raise ModelError(
            f"{path}: config.json is of a model of {least:.2g} weights or more (hidden_size {hidden}, vocab_size "
            f"{vocabulary}, num_hidden_layers {layers}), and its files hold {held:.2g} bytes: they are not of one model"
        )


def _rope_problems(config: Mapping[str, Any], prefix: str) -> list[str]:
    """What rotary embeddings are computed from: finite and above zero."""
    places = {prefix: config}
    for group in ("rope_parameters", "rope_scaling"):
        if isinstance(own := config.get(group), Mapping):
            places[f"{prefix}{group}."] = own
            places |= {f"{prefix}{group}.{name}.": each for name, each in own.items() if isinstance(each, Mapping)}
    problems = []
    for where, settings in places.items():
        for name in ("rope_theta", "factor") if where != prefix else ("rope_theta",):
            value = settings.get(name)
            numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not isinstance(value, (list, tuple)) and not (numeric and 0 < value < math.inf):
                problems.append(f"{where}{name}: {str(value)[:60]!r} is no finite number above 0")
    return problems


def _problems(config: Mapping[str, Any], prefix: str) -> list[str]:
    problems = []
    for name, largest in LARGEST.items():
        value = config.get(name)
        if value is None or isinstance(value, (list, tuple)):  # some families give one for each layer
            continue
        least = 0 if name in MAY_BE_ZERO else 1
        if isinstance(value, bool) or not isinstance(value, int):
            problems.append(f"{prefix}{name}: {str(value)[:60]!r} is no whole number")
        elif not least <= value <= largest:
            problems.append(f"{prefix}{name}: {str(value)[:30]}; expected {least} to {largest}")
    problems += _rope_problems(config, prefix)
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if not problems and isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        problems.append(f"{prefix}num_key_value_heads: {groups} do not divide {heads} attention heads")
    return problems
