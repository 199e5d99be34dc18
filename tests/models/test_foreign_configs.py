"""What stands in somebody's config.json is refused with the file and the field, whatever transformers makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lowrank.errors import ModelError
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load
from tests.checkpoint_folder import save_checkpoint_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint_folder(tmp_path_factory.mktemp("world") / "model")


@pytest.mark.parametrize(
    ("file", "changes", "described"),
    [
        ("config", {"rms_norm_eps": "x"}, "field 'rms_norm_eps'.*expected float, got str"),
        ("config", {"rms_norm_eps": -1}, "field 'rms_norm_eps'"),
        ("config", {"tie_word_embeddings": "x"}, "field 'tie_word_embeddings'"),
        ("config", {"eos_token_id": "x"}, "field 'eos_token_id'"),
        ("config", {"rope_parameters": 5}, "field 'rope_parameters'"),
        ("config", {"model_type": ["llama"]}, "config.json has no model_type"),
        ("config", {"hidden_act": "evil"}, r"does not know 'evil' \(hidden_act in config.json\)"),
        (
            "config",
            {"rope_parameters": {"rope_type": "evil", "rope_theta": 1e4}},
            "rope_parameters.rope_type in config",
        ),
        (
            "config",
            {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
            "rope_parameters.rope_theta: 'x' is",
        ),
        (
            "config",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}},
            "rope_parameters.factor",
        ),
        ("config", {"rope_theta": float("inf")}, "rope_theta: 'inf' is no finite number above 0"),
        ("config", {"layer_types": ["full_attention"]}, "config.json: Class validation error for validator '.*: "),
        ("config", {"_attn_implementation": "kernels-community/flash-attn2"}, "what a file says runs no code"),
        ("config", {"attn_implementation": {"": "paged|evil/kernel@v1:f"}}, "evil/kernel.*code from the hub"),
        ("config", {"text_config": {"experts_implementation": "evil/kernel"}}, "code from the hub"),
        ("tokenizer_config", {"model_max_length": "x"}, "model_max_length in tokenizer_config.json is 'x'"),
        ("generation_config", "[" * 100_000 + "]" * 100_000, "recursion"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_it_is_named(file: str, changes: dict[str, Any] | str, described: str, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / f"{file}.json"
    given = changes if isinstance(changes, str) else json.dumps({**json.loads(path.read_text()), **changes})
    path.write_text(given)
    with pytest.raises(ModelError, match=described):
        load(ModelConfig(path=str(tmp_path / "model"), device="cpu"))
