"""config.json in both forms, read by the rules of transformers 4 and of the installed 5; every writer of folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from lowrank.checkpoints.full_model import save_full
from lowrank.checkpoints.model_config import in_both_forms
from lowrank.checkpoints.packed_model import save_packed
from lowrank.export.merge.resize_vocabulary import add_tokens
from lowrank.export.targets.merged import MergedExportConfig
from lowrank.models.loading.quantize_on_load import pack_in_place
from lowrank.models.storages.nf4 import NF4Config
from tests.checkpoint_folder import save_checkpoint_folder
from tests.export.sources import make_source
from tests.tiny_models import FAMILIES

THETA = 1_000_000.0
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": THETA}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}),
    "yarn": ("qwen2", {"rope_parameters": YARN, "max_position_embeddings": 256}),
    "a share of each head": ("phi", {}),
    "two kinds of layers": ("gemma3", {}),
    "no rotary embedding": ("gpt2", {}),
}


def as_version_4(config: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """What its configuration classes took from the file: (rope_theta, rope_scaling)."""
    return config.get("rope_theta", 10000.0), config.get("rope_scaling")


@pytest.mark.parametrize("name", SHAPES)
def test_both_forms_say_the_same(name: str, tmp_path: Path) -> None:
    family, changes = SHAPES[name]
    config = FAMILIES[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    config.save_pretrained(tmp_path)
    own = json.loads((tmp_path / "config.json").read_text())
    both = in_both_forms(own)
    assert {key: both[key] for key in own} == own, "nothing that was there has changed"
    assert in_both_forms(both) == both
    (tmp_path / "config.json").write_text(json.dumps(both))
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert getattr(again, "rope_parameters", None) == getattr(config, "rope_parameters", None)
    theta, scaling = as_version_4(both)
    if name == "default":
        assert (theta, scaling) == (THETA, None)
    elif name == "yarn":
        assert theta == THETA
        assert scaling is not None
        assert scaling["rope_type"] == "yarn"
        assert (scaling["factor"], scaling["original_max_position_embeddings"]) == (4.0, 64)
    elif name == "a share of each head":
        assert both["partial_rotary_factor"] == own["rope_parameters"]["partial_rotary_factor"] < 1
    elif name == "two kinds of layers":
        assert theta == own["rope_parameters"]["full_attention"]["rope_theta"]
        assert both["rope_local_base_freq"] == own["rope_parameters"]["sliding_attention"]["rope_theta"]
    else:
        assert both == own


def test_a_configuration_inside_another() -> None:
    inner = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
    assert in_both_forms({"text_config": inner})["text_config"]["rope_theta"] == THETA


@pytest.mark.parametrize("writer", ["full", "packed", "vocab", "merged"])
def test_every_writer(writer: str, tmp_path: Path) -> None:
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
    base, out = save_checkpoint_folder(tmp_path / "base", **changes), tmp_path / "out"
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if writer == "full":
        save_full(out, model, tokenizer.save_pretrained)
    elif writer == "packed":
        pack_in_place(model, NF4Config())
        save_packed(out, model, tokenizer)
    elif writer == "vocab":
        add_tokens(base, out, ["<call>"], [])
    else:
        source = make_source(tmp_path / "source", None, **changes)
        out.mkdir()
        MergedExportConfig().build().write(source, out, lambda *_: None)
    assert as_version_4(json.loads((out / "config.json").read_text())) == (THETA, None)
    assert transformers.AutoConfig.from_pretrained(out).rope_parameters["rope_theta"] == THETA
