"""GLM-4 (0414)."""

from __future__ import annotations

from typing import Any

from lowrank.export.gguf.pieces import Family, Fields, head_dim, refuse_rope, rope, transformer_fields


def fields(config: dict[str, Any]) -> Fields:
    """Half of a head's channels are rotated unless it says otherwise."""
    share = rope(config).get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
    return transformer_fields(config) | {"rope.dimension_count": int(head_dim(config) * share)}


FAMILIES = {
    "glm4": Family(arch="glm4", fields=fields, refuse=lambda config: refuse_rope(config, "linear", "yarn")),
}
