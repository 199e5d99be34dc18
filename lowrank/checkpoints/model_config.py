"""config.json of a model's folder, as readers old and new understand it.

transformers 5 writes what a rotary embedding needs into `rope_parameters` alone. Versions before, and what was built
on them, look for `rope_theta`, `rope_scaling` and `partial_rotary_factor` beside the other keys, and take their
defaults where those are not: a base of 1,000,000 then turns with 10,000, without a word. Both forms are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.checkpoints.atomic import write_text

FILE = "config.json"
_OLD_KINDS = ("linear", "dynamic", "yarn", "longrope", "llama3")
"""Of stretching, that versions before 5 knew. Of a newer kind (Gemma 4's `proportional`) they could make nothing, and
transformers 5 would take what is written here for the whole."""
_FULL, _SLIDING = "full_attention", "sliding_attention"


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config` into `folder`, with the older form of its rotary settings beside the newer."""
    write_text(folder / FILE, json.dumps(in_both_forms(config), indent=2, ensure_ascii=False) + "\n")


def rewrite_config(folder: Path) -> None:
    """The same for a config.json that transformers has written."""
    write_config(folder, json.loads((folder / FILE).read_text(encoding="utf-8")))


def in_both_forms(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, and the configurations inside it, with the older keys that follow from `rope_parameters`. Keys that are
    there already stay as they are."""
    both = {key: in_both_forms(value) if _is_config(key, value) else value for key, value in config.items()}
    given = config.get("rope_parameters")
    if not isinstance(given, dict):
        return both
    if _FULL in given and isinstance(given[_FULL], dict):  # one for each kind of layer, as Gemma 3 has them
        old = _old_form(given[_FULL])
        if isinstance(given.get(_SLIDING), dict) and "rope_theta" in given[_SLIDING]:
            old["rope_local_base_freq"] = given[_SLIDING]["rope_theta"]
    elif any(isinstance(value, dict) for value in given.values()):
        return both  # kinds of layers that no older version knew
    else:
        old = _old_form(given)
    return {**old, **both}


def _is_config(key: str, value: Any) -> bool:
    return isinstance(value, dict) and key.endswith("_config") and key != "quantization_config"


def _old_form(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of transformers 4: the base and the turning share of a head stand by themselves, the rest only where the
    embedding is stretched."""
    old = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if parameters.get(key) is not None}
    kind = parameters.get("rope_type", "default")
    if kind in _OLD_KINDS:
        old["rope_scaling"] = {key: value for key, value in parameters.items() if key not in old}
    return old
