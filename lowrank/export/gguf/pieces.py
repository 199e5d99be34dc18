"""What a family's file says: which tensor of the GGUF file is made of which tensors of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

Make = Callable[[torch.Tensor], torch.Tensor]
Fields = dict[str, Any]
"""Keys of the GGUF header below the architecture's name: int, float, bool, str, or a list of one of them."""


def same(tensor: torch.Tensor) -> torch.Tensor:
    """As it was."""
    return tensor


@dataclass(frozen=True)
class Part:
    """One tensor to be: its name in the terms of a checkpoint, the tensors it is made of, and how.

    Several sources are made one by one and stacked, so that a layer's experts are never all in memory.
    """

    name: str
    sources: tuple[str, ...]
    make: Make = same


@dataclass(frozen=True)
class Family:
    """How models of one transformers `model_type` are told to llama.cpp.

    `parts(config, name)`: what becomes of the checkpoint's tensor `name`; None: it is dropped.
    """

    arch: str
    """gguf's name of the architecture."""
    fields: Callable[[dict[str, Any]], Fields]
    parts: Callable[[dict[str, Any], str], list[Part] | None] = lambda config, name: [Part(name, (name,))]
    extra: Callable[[dict[str, Any]], dict[str, torch.Tensor]] = lambda config: {}
    """Tensors the checkpoint does not have, by their GGUF names."""
    refuse: Callable[[dict[str, Any]], list[str]] = lambda config: []
    """What in this configuration llama.cpp would compute otherwise: one sentence each."""
    notes: Callable[[dict[str, Any]], list[str]] = lambda config: []
    """What the user should know but can live with."""
    activations: tuple[str, ...] = ("silu",)
    """What llama.cpp computes for this architecture, in transformers' names."""
    experts: dict[str, str] = field(default_factory=dict)
    """Name of an expert's matrix in the checkpoint -> its name in the stack (`gate_proj`, ...)."""


def transformer_fields(config: dict[str, Any]) -> Fields:
    """The fields most decoder families share."""
    heads = config["num_attention_heads"]
    fields: Fields = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "vocab_size": config["vocab_size"],
        **rope_fields(config),
    }
    if config.get("rms_norm_eps") is not None:
        fields["attention.layer_norm_rms_epsilon"] = float(config["rms_norm_eps"])
    if config.get("head_dim"):
        fields["attention.key_length"] = fields["attention.value_length"] = config["head_dim"]
    return fields


def head_dim(config: dict[str, Any]) -> int:
    """Channels of one attention head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters of full attention layers: transformers 5's, which it also makes of the older keys."""
    given = config.get("rope_parameters") or {}
    return given.get("full_attention", given)


def rope_fields(config: dict[str, Any]) -> Fields:
    """Base frequency and stretching."""
    parameters = rope(config)
    fields: Fields = {}
    if parameters.get("rope_theta") is not None:
        fields["rope.freq_base"] = float(parameters["rope_theta"])
    kind = parameters.get("rope_type", "default")
    if kind == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}
    if kind == "yarn":
        fields |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(parameters["factor"]),
            "rope.scaling.original_context_length": parameters["original_max_position_embeddings"],
        }
        names = {
            "attention_factor": "attn_factor",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        for ours, theirs in names.items():
            if parameters.get(ours) is not None:
                fields[f"rope.scaling.{theirs}"] = float(parameters[ours])
    return fields


def moe_fields(config: dict[str, Any]) -> Fields:
    """How many experts, of which each token takes some. Families, and versions of transformers, name them variously."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next(config[name] for name in names if config.get(name))
    return {"expert_count": count, "expert_used_count": config["num_experts_per_tok"]}


def refuse_rope(config: dict[str, Any], *known: str) -> list[str]:
    """A stretching that this architecture has no field for."""
    kind = rope(config).get("rope_type", "default")
    return [] if kind in ("default", *known) else [f"rope_type {kind!r} (known here: default, {', '.join(known)})"]


def windows(config: dict[str, Any]) -> list[str]:
    """A note about a sliding window that llama.cpp does not know for this architecture."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False or window >= config["max_position_embeddings"]:
        return []
    return [
        f"llama.cpp knows no sliding window for {config['model_type']}: it attends to everything, "
        f"so texts of more than {window} tokens are answered otherwise than by transformers"
    ]


def interleave_heads(heads: int) -> Make:
    """Rows of a query or key projection in the order of llama.cpp's `llama`, which rotates neighbors (x0, x1).

    transformers rotates (x0, x_half); so row i of the first half goes to 2i, of the second to 2i + 1.
    """

    def make(tensor: torch.Tensor) -> torch.Tensor:
        rest = tensor.shape[1:]
        return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *rest).swapaxes(1, 2).reshape(tensor.shape)

    return make


def plus_one(tensor: torch.Tensor) -> torch.Tensor:
    """Gemma's norms multiply by 1 + w."""
    return tensor.float() + 1.0


def all_parts(family: Family, config: dict[str, Any], names: list[str]) -> Iterator[Part]:
    """Every tensor to be, experts stacked. The order is that of `names`."""
    stacks: dict[str, dict[int, str]] = {}
    plain: list[str] = []
    for name in names:
        before, found, after = name.partition(".experts.")
        number, _, matrix = after.partition(".")
        matrix = matrix.removesuffix(".weight")
        if found and number.isdecimal() and matrix in family.experts:
            stacks.setdefault(f"{before}.experts.{family.experts[matrix]}.weight", {})[int(number)] = name
        else:
            plain.append(name)
    for name in plain:
        yield from family.parts(config, name) or []
    for name, sources in stacks.items():
        yield Part(name, tuple(sources[number] for number in sorted(sources)))
