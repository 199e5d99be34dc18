"""tuning: freeze, block expansion and stretched positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lowrank.cli.expand import expand_model
from lowrank.config import RunConfig
from lowrank.errors import ConfigError, ModelError
from lowrank.models.config import FreezeConfig, ModelConfig
from lowrank.models.freezing import chosen_layers, train_only
from lowrank.models.loading.pretrained import load, load_tokenizer, locate
from lowrank.pipelines.train import train
from tests.tiny_composites import make_composite
from tests.tiny_models import make_base, make_model


def test_which_layers() -> None:
    """As LLaMA-Factory chooses them."""
    assert chosen_layers(FreezeConfig(trainable_layers=3), 8) == [5, 6, 7]
    assert chosen_layers(FreezeConfig(trainable_layers=-3), 8) == [0, 1, 2]
    assert chosen_layers(FreezeConfig(trainable_layers=2, spread=True), 8) == [3, 7]
    for config in (FreezeConfig(trainable_layers=9), FreezeConfig(trainable_layers=3, spread=True)):
        with pytest.raises(ModelError, match=r"freeze\.trainable_layers"):
            chosen_layers(config, 8)


def test_which_parameters() -> None:
    model = make_model("llama", torch.float32)
    config = FreezeConfig(trainable_layers=1, trainable_modules=("mlp",), extra_modules=("lm_head", "norm"))
    names = train_only(model, config)
    assert all(
        name.startswith("model.layers.1.mlp.") or name in ("lm_head.weight", "model.norm.weight") for name in names
    )
    assert len(names) == 5
    wrong = FreezeConfig(trainable_modules=("mpl",), extra_modules=("mlp",))
    with pytest.raises(ModelError) as caught:
        train_only(model, wrong)
    assert "did you mean 'mlp'?" in str(caught.value)
    assert "freeze.extra_modules: outside its layers the language model has no 'mlp'" in str(caught.value)


def test_parts_of_a_tower_are_no_part_of_what_is_trained() -> None:
    """They would be called trained, and have no gradients."""
    model = make_composite("llava")
    for name in ("linear_1", "patch_embedding", "k_proj"):
        with pytest.raises(ModelError, match=f"the language model has no '{name}'"):
            train_only(model, FreezeConfig(trainable_layers=1, extra_modules=(name,)))
    names = train_only(model, FreezeConfig(trainable_layers=0, extra_modules=("embed_tokens", "norm", "lm_head")))
    assert names
    assert all(each.split(".")[-2] in ("embed_tokens", "norm", "lm_head") for each in names)


def run(folder: Path, **more: Any) -> dict[str, Any]:
    data = {"train": ["lowrank/demo"], "max_samples": 8, "batch_size": 2, "max_length": 128}
    return train(
        RunConfig.model_validate(
            {"model": "lowrank/tiny", "data": data, "output_dir": folder, "max_steps": 2, "tuning": "freeze", **more}
        )
    )


def test_a_run_changes_what_was_chosen_and_nothing_else(tmp_path: Path) -> None:
    run(
        tmp_path / "run",
        freeze={"trainable_layers": 1},
        model={"path": "lowrank/tiny", "dtype": "float32"},
        optimizer={"weight_decay": 0.1},
    )
    before = load_file(Path(locate("lowrank/tiny")) / "model.safetensors")
    after = load_file(tmp_path / "run" / "default" / "last" / "model.safetensors")
    layers = transformers.AutoConfig.from_pretrained(locate("lowrank/tiny")).num_hidden_layers
    changed = {name for name, value in after.items() if not torch.equal(value, before[name].float())}
    assert changed == {name for name in before if name.startswith(f"model.layers.{layers - 1}.")}


def test_more_than_one_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trains the base's own parameters"):
        run(tmp_path, jobs=[{"name": "a"}, {"name": "b", "tuning": "adapter"}])


def test_an_expanded_model_computes_the_same(tmp_path: Path) -> None:
    layers = expand_model(ModelConfig(path="lowrank/tiny"), 2, tmp_path / "grown")
    small, grown = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (locate("lowrank/tiny"), tmp_path / "grown")
    )
    assert layers == small.config.num_hidden_layers + 2 == len(grown.model.layers)
    token = torch.arange(5, 30)[None]
    with torch.no_grad():
        assert torch.equal(small(token).logits, grown(token).logits)
    stride = layers // 2
    for name, value in grown.named_parameters():
        new = int(name.split(".")[2]) % stride == stride - 1 if ".layers." in name else False
        zero = new and ("o_proj" in name or "down_proj" in name)
        assert bool((value == 0).all()) is zero, name
    load_tokenizer(ModelConfig(path=str(tmp_path / "grown")))
    with pytest.raises(ModelError, match="cannot be expanded by"):
        expand_model(ModelConfig(path="lowrank/tiny"), layers + 1, tmp_path / "other")


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_stretched_positions(kind: str) -> None:
    """transformers computes them; a base that reads twice as far says so, and the leak test holds."""
    received: list[str] = []
    settings = {"path": "lowrank/tiny", "dtype": "float32", "rope_scaling": {"type": kind, "factor": 2.0}}
    base = load(ModelConfig.model_validate(settings), notify=received.append)
    plain = transformers.AutoConfig.from_pretrained(locate("lowrank/tiny"))
    assert base.model.config.max_position_embeddings == 2 * plain.max_position_embeddings
    assert base.layout == "packed"
    assert any(text.startswith(f"the rotary embedding is stretched ({kind}, factor 2)") for text in received)
    frequencies = base.model.model.rotary_emb.inv_freq
    assert float(frequencies[-1]) == pytest.approx(float(make_frequencies(plain)[-1]) / 2, rel=1e-3)


def make_frequencies(config: Any) -> torch.Tensor:
    return transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq


def test_what_cannot_be_stretched(tmp_path: Path) -> None:
    base = make_base("gpt2", torch.float32)
    base.model.save_pretrained(tmp_path)
    load_tokenizer(ModelConfig(path="lowrank/tiny")).save_pretrained(tmp_path)
    settings = {"path": str(tmp_path), "rope_scaling": {"factor": 2.0}}
    with pytest.raises(ModelError, match="gpt2 has no rotary embedding"):
        load(ModelConfig.model_validate(settings))
    with pytest.raises((ConfigError, ValueError), match="documents would change one another; use yarn"):
        ModelConfig.model_validate({"path": "x", "rope_scaling": {"type": "dynamic", "factor": 2.0}})
