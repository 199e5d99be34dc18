"""Which type each tensor of a quantized file gets: llama.cpp's mixes, tensor by tensor.

`Q4_K_M` is no type but a recipe: most matrices Q4_K, the more delicate ones (values, the second half of the
feed-forward block, the head) in more bits. The rules are those of llama-quant.cpp (MIT license, read at
llama.cpp of 2026-10-01), so that a file made here is the one `llama-quantize` makes, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

BASES = {
    "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0", "Q5_1": "Q5_1", "Q8_0": "Q8_0", "Q2_K": "Q2_K", "Q2_K_S": "Q2_K",
    "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K", "Q6_K": "Q6_K", "IQ1_S": "IQ1_S", "IQ1_M": "IQ1_M", "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS",
    "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "IQ3_XXS": "IQ3_XXS", "IQ3_XS": "IQ3_S", "IQ3_S": "IQ3_S", "IQ3_M": "IQ3_S",
    "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_XS",
}  # fmt: skip
"""Every recipe and the type it starts from."""

NEED_IMPORTANCE = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}
"""Types whose kernels end the process without an importance matrix."""

FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What a row whose length is no multiple of 256 gets instead."""

_TINY_IQ = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"}
_MORE_FOR_EIGHT = {
    "Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS",
}  # fmt: skip
_SMALL_ROWS = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"}
_KEPT = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv",
)


@dataclass(frozen=True)
class ModelShape:
    """What the recipes look at."""

    arch: str
    num_layers: int
    heads_per_kv_head: int
    num_experts: int
    tied: bool
    """Embedding and head are one tensor."""
    num_value_tensors: int
    is_70b: bool


@dataclass
class _Seen:
    """How many tensors of a kind have been dealt with; the recipes treat early and late ones differently."""

    values: int = 0
    down: int = 0
    gate: int = 0
    up: int = 0


def describe(arch: str, fields: Mapping[str, Any], names: Collection[str]) -> ModelShape:
    """`fields`: the file's header; `names`: its tensors."""

    def number(key: str) -> int:
        value = fields.get(f"{arch}.{key}", 0)
        return int(value[0] if isinstance(value, (list, tuple)) else value)

    heads = number("attention.head_count")
    kv_heads = number("attention.head_count_kv") or heads
    layers, experts = number("block_count"), number("expert_count")
    grouped = heads != kv_heads and experts != 8
    return ModelShape(
        arch=arch,
        num_layers=layers,
        heads_per_kv_head=heads // kv_heads,
        num_experts=experts,
        tied="output.weight" not in names,
        num_value_tensors=sum(_kind(name) in ("values", "qkv") for name in names),
        is_70b=layers == 80 and ((arch == "llama" and grouped) or arch == "qwen2"),
    )


def choose_types(
    recipe: str, model: ModelShape, shapes: Mapping[str, tuple[int, ...]], has_importance: bool
) -> dict[str, str | None]:
    """The type of every tensor; None: it stays as it is. `shapes` in torch's order."""
    seen = _Seen()
    chosen: dict[str, str | None] = {}
    for name in sorted(shapes, key=_place):
        if not _is_quantized(name, shapes[name]):
            chosen[name] = None
            continue
        wanted = _wanted(recipe, model, name, shapes[name][-1], seen, has_importance)
        chosen[name] = _fitting(wanted, shapes[name][-1])
    return chosen


def needs_importance(chosen: Mapping[str, str | None]) -> list[str]:
    """Tensors that cannot be made without an importance matrix."""
    free = ("token_embd.weight", "output.weight")
    return [name for name, kind in chosen.items() if kind in NEED_IMPORTANCE and name not in free]


def _place(name: str) -> tuple[int, str]:
    layer = re.match(r"blk\.(\d+)\.", name)
    return (int(layer[1]) if layer else -1, name)


def _is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    if len(shape) < 2 or not name.endswith("weight") or any(part in name for part in _KEPT):
        return False
    return name not in ("position_embd.weight", "token_types.weight")


def _kind(name: str) -> str:
    """What the recipes tell apart."""
    if name == "output.weight":
        return "head"
    if name == "token_embd.weight":
        return "embedding"
    for part, kind in (
        ("attn_qkv.weight", "qkv"), ("attn_kv_b.weight", "values"), ("attn_v.weight", "values"),
        ("attn_k.weight", "keys"), ("attn_q.weight", "queries"), ("attn_output.weight", "output"),
        ("ffn_up", "up"), ("ffn_gate", "gate"), ("ffn_down", "down"),
    ):  # fmt: skip
        if part in name:
            return kind
    return "other"


def _fitting(wanted: str, width: int) -> str:
    """`wanted`, or what rows of this length can be stored in."""
    if width % (32 if wanted in _SMALL_ROWS else 256) == 0:
        return wanted
    smaller = FALLBACKS.get(wanted, wanted)
    return smaller if width % 32 == 0 else "F16"


def _more_bits(layer: int, count: int) -> bool:
    return layer < count // 8 or layer >= 7 * count // 8 or (layer - count // 8) % 3 == 2


def _wanted(recipe: str, model: ModelShape, name: str, width: int, seen: _Seen, has_importance: bool) -> str:
    """The recipe's wish for the next tensor; counts it."""
    kind, base = _kind(name), BASES[recipe]
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    if kind == "head" or (kind == "embedding" and model.tied):
        return _head(recipe, base, model.arch, width)
    if kind == "embedding":
        return _embedding(recipe, base)
    if recipe in _TINY_IQ:
        return _tiny(recipe, base, kind, model, seen)
    if kind in ("values", "qkv"):
        seen.values += 1
        return _values(recipe, base, model, seen.values - 1, has_importance)
    if kind in ("keys", "queries"):
        if kind == "keys" and model.num_experts == 8:
            return "Q8_0"
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(recipe, base)
    if kind == "output":
        return _output(recipe, base, model)
    if kind == "down":
        seen.down += 1
        return _down(recipe, base, model, layer if model.num_experts > 1 else seen.down - 1, has_importance)
    if kind in ("gate", "up"):
        place = layer if model.num_experts > 1 else getattr(seen, kind)
        setattr(seen, kind, getattr(seen, kind) + 1)
        middle = model.num_layers // 8 <= place < 7 * model.num_layers // 8
        return "IQ3_XXS" if recipe == "IQ3_XS" and middle else base
    return base


def _head(recipe: str, base: str, arch: str, width: int) -> str:
    if arch == "falcon" or width % (32 if base in _SMALL_ROWS else 256):
        return "Q8_0"
    if recipe in _TINY_IQ or recipe == "IQ3_XXS":
        return "Q5_K"
    return base if base == "Q8_0" else "Q6_K"


def _embedding(recipe: str, base: str) -> str:
    if recipe in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
        return "Q2_K"
    return "IQ3_S" if recipe in ("IQ2_S", "IQ2_M", "IQ3_XXS") else base


def _tiny(recipe: str, base: str, kind: str, model: ModelShape, seen: _Seen) -> str:
    """Recipes of about two bits and less."""
    larger = "IQ3_S" if recipe in ("IQ2_S", "IQ2_M") else "Q2_K"
    if kind in ("values", "qkv"):
        seen.values += 1
        return "Q4_K" if model.heads_per_kv_head >= 4 or model.num_experts >= 4 else larger
    if kind == "keys" and model.num_experts == 8:
        return "Q4_K"
    if kind == "down":
        seen.down += 1
        return larger if seen.down - 1 < model.num_layers // 8 else base
    if kind == "output":
        if model.num_experts == 8:
            return "Q5_K"
        if recipe in ("IQ1_S", "IQ1_M"):
            return "IQ2_XXS"
        return "IQ3_S" if recipe in ("IQ2_S", "IQ2_M") else base
    return base


def _values(recipe: str, base: str, model: ModelShape, place: int, has_importance: bool) -> str:
    grouped = model.heads_per_kv_head >= 4
    wish = base
    if recipe == "Q2_K":
        wish = "Q4_K" if grouped else "Q3_K"
    elif recipe in ("Q2_K_S", "IQ3_XS", "IQ3_S") and grouped:
        wish = "Q4_K"
    elif recipe == "IQ3_XXS":
        wish = "Q4_K" if grouped else "IQ3_XXS" if has_importance else "IQ3_S"
    elif recipe == "IQ3_M":
        wish = "Q4_K"
    elif recipe == "Q3_K_M":
        wish = "Q5_K" if place < 2 else "Q4_K"
    elif recipe == "Q3_K_L" or (recipe in ("IQ4_NL", "IQ4_XS") and grouped):
        wish = "Q5_K"
    elif recipe in ("Q4_K_M", "Q5_K_M") and _more_bits(place, model.num_value_tensors):
        wish = "Q6_K"
    elif recipe == "Q4_K_S" and place < 4:
        wish = "Q5_K"
    if model.is_70b and wish in ("Q3_K", "Q4_K"):
        wish = "Q5_K"
    return "Q8_0" if model.num_experts == 8 else wish


def _output(recipe: str, base: str, model: ModelShape) -> str:
    if model.arch == "falcon":
        return "Q4_K" if recipe == "Q3_K_L" else base
    if model.num_experts == 8:
        return "Q5_K" if recipe in _MORE_FOR_EIGHT else base
    return {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(recipe, base)


def _down(recipe: str, base: str, model: ModelShape, place: int, has_importance: bool) -> str:
    count, falcon = model.num_layers, model.arch == "falcon"
    early, more = place < count // 8, _more_bits(place, count)
    if recipe == "Q2_K":
        return "Q3_K"
    if recipe == "Q3_K_L":
        return "Q4_K" if falcon else "Q5_K"
    if recipe == "Q3_K_M":
        return "Q5_K" if place < count // 16 else "Q4_K" if not falcon or more else "Q3_K"
    if recipe == "Q4_K_M" and falcon:
        return "Q6_K" if place < count // 16 else "Q5_K" if more else "Q4_K"
    if recipe in ("Q4_K_M", "Q5_K_M") and more:
        return "Q6_K"
    if recipe == "Q2_K_S" and early:
        return "Q4_K"
    if recipe == "IQ3_XXS" and not has_importance:
        return "Q4_K" if early else "Q3_K"
    if recipe == "IQ3_M" and (early or (model.num_experts == 8 and more)):
        return "Q4_K"
    if recipe in ("IQ4_NL", "IQ4_XS") and early and not has_importance:
        return "Q5_K"
    if recipe == "Q4_K_S" and early and not falcon:
        return "Q5_K"
    if recipe in ("Q4_0", "Q5_0") and early and has_importance:
        return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[recipe]
    return base
