"""Ways to spread a model that training does not know, by others' names for them: why not, and what instead."""

from __future__ import annotations

import re

_WAY_OUT = "set devices, and base: sharded or streamed where the base fits on none of them (docs/distributed.md)"
_WHY: dict[str, str] = {
    "tensor": "tensor parallelism reduces all activations four times a layer, where a sharded base gathers its weights "
    "twice a pass, however long that is",
    "pipeline": "a pipeline fills bubbles that are not here, and its stages want batches of one shape, which packed "
    "documents have not",
    "expert": "experts on devices of their own want kernels and links of their own; a sharded base holds a mixture's "
    "too",
    "context": "a document is not cut over devices: the engines for that know one causal document, no packed stream; "
    "set data.max_length to what one device holds, with model.activation_checkpointing: full",
}
_NAMES = re.compile(
    r"(?P<tensor>tensor|tp)|(?P<pipeline>pipeline|pp)|(?P<expert>expert|ep|moe)|"
    r"(?P<context>context|cp|sequence|sp|ulysses|ring_attn)"
)
_SIZED = re.compile(
    r"(?P<kind>[a-z_]+?)(_model)?_?parallel(ism)?(_size|_degree)?|(?P<short>tp|pp|ep|cp|sp|ulysses)_?(size|degree)"
)
"""`context_size` is others' name for how long a document may be."""
ENGINES = ("deepspeed", "deepspeed_config", "fsdp", "fsdp_config", "megatron", "accelerate")
"""Programs whose own files say how to spread a model."""


def why_refused(key: str, value: object = None) -> str | None:
    """What to say about a setting `key` that is none, or about a `parallelism` that is none; None for any other."""
    if key in ENGINES:
        return f"it is {key.partition('_')[0]}'s, which lowrank does not need: {_WAY_OUT}"
    sized = _SIZED.fullmatch(key)
    text = str(value) if key == "parallelism" else sized["kind"] or sized["short"] if sized else ""
    found = _NAMES.fullmatch(text)
    if found is None:
        return None
    kind = next(name for name, part in found.groupdict().items() if part)
    return f"{_WHY[kind]}; {_WAY_OUT}" if kind != "context" else _WHY[kind]
