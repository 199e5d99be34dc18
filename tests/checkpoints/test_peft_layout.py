"""Adapters go to PEFT and come back from it with the same logits. The oracle is a base with the update merged in."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.bank import Bank
from lowrank.adapters.targets import find_targets
from lowrank.adapters.variants import lora, rslora
from lowrank.checkpoints.adapter_folder import CONFIG_FILE, TENSOR_FILE
from lowrank.checkpoints.base_tensors import on_base, on_model
from lowrank.checkpoints.peft_config import describe_base, peft_incompatibility
from lowrank.checkpoints.peft_layout import (
    AdapterOnDisk,
    load_adapter,
    save_adapter,
)
from lowrank.errors import ModelError
from tests.tiny_models import FAMILIES, make_base, make_model

TOKEN = torch.tensor([[5, 9, 11, 3, 8], [7, 7, 4, 60, 90]])
MISREAD_BY_PEFT = {"deepseek_v3", "jamba"}
"""Mixtures with dense layers named like their experts once were."""


@pytest.fixture(autouse=True)
def _peft_may_warn() -> Iterator[None]:
    """PEFT warns of what transformers deprecates, and of tied weights; both are its own affair."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        yield


def random_adapter(model: Any, config: Any) -> AdapterOnDisk:
    """An adapter as the bank would hold it, far from the identity."""
    generator = torch.Generator().manual_seed(1)
    found = find_targets(model, config)
    targets, tensors = {}, {}
    for name in (*found.linears, *found.embeddings):
        rank = next((value for key, value in config.rank_pattern.items() if name.endswith(key)), config.rank)
        alpha = next((value for key, value in config.alpha_pattern.items() if name.endswith(key)), config.alpha)
        targets[name] = (rank, float(alpha or 2 * config.rank))
        module = model.get_submodule(name)
        height, width = module.weight.shape
        if name in found.embeddings:
            shapes = {"lora_embedding_A": (rank, height), "lora_embedding_B": (width, rank)}
        else:
            rows, columns = (width, height) if isinstance(module, Conv1D) else (height, width)
            shapes = {"lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank)}
        for key, shape in shapes.items():
            tensors[f"{name}.{key}"] = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    for name in found.copies:
        for key, value in model.get_submodule(name).state_dict().items():
            tensors[f"{name}.{key}"] = value + 0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return AdapterOnDisk(config, tensors, targets)


@torch.no_grad()
def merged_logits(model: Any, adapter: AdapterOnDisk, token: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of the base with each update added to its own copy of the weight."""
    model = copy.deepcopy(model)
    deltas: dict[str, torch.Tensor] = {}
    for name, (rank, alpha) in adapter.targets.items():
        scale = alpha / (math.sqrt(rank) if adapter.config.type == "rslora" else rank)
        part = {key: adapter.tensors.get(f"{name}.{key}") for key in ("lora_A.weight", "lora_embedding_A")}
        if part["lora_A.weight"] is not None:
            deltas[name] = scale * adapter.tensors[f"{name}.lora_B.weight"] @ part["lora_A.weight"]
        else:
            embedding_A = part["lora_embedding_A"]
            assert embedding_A is not None
            deltas[name] = scale * (adapter.tensors[f"{name}.lora_embedding_B"] @ embedding_A).T
    own = {key: value for key, value in adapter.tensors.items() if ".lora_" not in key}
    modules = {name.rpartition(".")[0]: model.get_submodule(name.rpartition(".")[0]) for name in own}
    for name, module in {**modules, **{name: model.get_submodule(name) for name in deltas}}.items():
        weight = own.get(f"{name}.weight", module.weight)
        delta = deltas.get(name, torch.zeros(()))
        module.weight = torch.nn.Parameter(weight + (delta.T if isinstance(module, Conv1D) else delta))
        if f"{name}.bias" in own:
            module.bias = torch.nn.Parameter(own[f"{name}.bias"])
    return model(TOKEN if token is None else token).logits


def logits_in_peft(model: Any, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))(TOKEN).logits


def assert_same(got: torch.Tensor, expected: torch.Tensor, model: Any) -> None:
    assert (model(TOKEN).logits - expected).abs().max() > 1e-3, "the adapter does nothing, so nothing is tested"
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def read_fields(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG_FILE).read_text())


# ---- ours to PEFT -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_all_linear_of_every_family(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    adapter = random_adapter(model, lora.LoraConfig(rank=2))
    base = describe_base(model, "tiny")
    save_adapter(tmp_path / "a", adapter, base, dtype=None)
    problem = peft_incompatibility(base, adapter.targets)
    assert (problem is not None) == (family in MISREAD_BY_PEFT)
    if problem is None:
        assert_same(logits_in_peft(model, tmp_path / "a"), merged_logits(model, adapter), model)
    else:
        assert problem in (tmp_path / "a" / "README.md").read_text()
    back = load_adapter(tmp_path / "a")
    assert back.targets == adapter.targets
    assert all(torch.equal(back.tensors[name], value) for name, value in adapter.tensors.items())


CONFIGS = {
    "names": lora.LoraConfig(rank=4, alpha=6.5, target_modules=("q_proj", "v_proj")),
    "some layers": lora.LoraConfig(rank=2, target_modules=r".*layers\.1\..*(up|o)_proj"),
    "patterns": lora.LoraConfig(
        rank=4, rank_pattern={"q_proj": 2, "layers.1.self_attn.v_proj": 8}, alpha_pattern={"layers.0.mlp.up_proj": 3.0}
    ),
    "rslora": rslora.RsLoraConfig(rank=4, alpha=4, rank_pattern={"k_proj": 9}),
    "head": lora.LoraConfig(rank=2, target_modules=("q_proj", "lm_head")),
    "embedding": lora.LoraConfig(rank=2, target_modules=("q_proj", "embed_tokens"), dropout=0.25),
    "copies": lora.LoraConfig(rank=2, target_modules=("q_proj",), modules_to_save=("model.norm", "lm_head")),
    "copied block": lora.LoraConfig(rank=2, target_modules="all-linear", exclude_modules=r".*layers\.0\.mlp.*",
                                modules_to_save=("layers.0.mlp",)),
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CONFIGS)
def test_peft_loads_ours(case: str, tied: bool, tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=tied)
    adapter = random_adapter(model, CONFIGS[case])
    copies = find_targets(model, CONFIGS[case]).copies
    save_adapter(tmp_path / "a", adapter, describe_base(model, "tiny"), copies=copies, dtype=None)
    assert_same(logits_in_peft(model, tmp_path / "a"), merged_logits(model, adapter), model)


@pytest.mark.parametrize("config", [
    lora.LoraConfig(rank=2, rank_pattern={"c_attn": 3}),
    lora.LoraConfig(rank=2, target_modules=("c_fc", "lm_head", "wte")),
    rslora.RsLoraConfig(rank=2, target_modules=("h.1.attn.c_proj",), modules_to_save=("ln_f", "h.0.ln_1")),
])  # fmt: skip
def test_peft_loads_ours_on_gpt2(config: Any, tmp_path: Path) -> None:
    model = make_model("gpt2")
    adapter = random_adapter(model, config)
    copies = find_targets(model, config).copies
    save_adapter(tmp_path / "a", adapter, describe_base(model, "tiny"), copies=copies, dtype=None)
    with warnings.catch_warnings():
        # a Linear beside Conv1D layers: PEFT corrects the one flag it has for both
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True but the target module is")
        got = logits_in_peft(model, tmp_path / "a")
    assert read_fields(tmp_path / "a")["fan_in_fan_out"] is True
    assert_same(got, merged_logits(model, adapter), model)


def test_files_are_small_and_float32_as_people_expect(tmp_path: Path) -> None:
    model = make_model("llama")
    adapter = random_adapter(model, lora.LoraConfig(rank=4, alpha=16))
    adapter.tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.randn(32, 4).T  # strided
    save_adapter(
        tmp_path / "a", adapter, describe_base(model, "some/base", "v1"), also=lambda folder: (folder / "x").touch()
    )
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["README.md", CONFIG_FILE, TENSOR_FILE, "x"]
    fields = read_fields(tmp_path / "a")
    assert fields["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (fields["r"], fields["lora_alpha"], fields["rank_pattern"]) == (4, 16, {})
    assert (fields["base_model_name_or_path"], fields["revision"]) == ("some/base", "v1")
    assert {value.dtype for value in load_file(tmp_path / "a" / TENSOR_FILE).values()} == {torch.float32}
    assert "base_model: some/base" in (tmp_path / "a" / "README.md").read_text()
    # PEFT knows every field and needs no other
    assert set(fields) <= set(peft.LoraConfig().to_dict())


def test_names_are_written_in_full_where_short_ones_reach_too_far(tmp_path: Path) -> None:
    model = make_model("llama")
    config = lora.LoraConfig(rank=2, target_modules=("layers.0.self_attn.q_proj", "v_proj"), modules_to_save=("norm",))
    adapter = random_adapter(model, config)
    save_adapter(tmp_path / "a", adapter, describe_base(model, "tiny"), copies=("model.norm",))
    fields = read_fields(tmp_path / "a")
    assert fields["target_modules"] == ["model.layers.0.self_attn.q_proj", "v_proj"]
    assert fields["modules_to_save"] == ["model.norm"]  # PEFT would take input_layernorm for a `norm`


# ---- PEFT to ours -------------------------------------------------------------------------------------------------


def saved_by_peft(model: Any, folder: Path, **settings: Any) -> torch.Tensor:
    """Let PEFT make, randomize and save an adapter; its logits."""
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        logits = adapted.eval()(TOKEN).logits
    adapted.save_pretrained(str(folder))
    return logits


BY_PEFT: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.1},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "regex": {"r": 2, "target_modules": r".*\.1\..*q_proj"},
    "layers": {"r": 2, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "exclude": {"r": 2, "target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    "patterns": {
        "r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {r"layers\.0\..*q_proj": 2, "q_proj": 6},
        "alpha_pattern": {"down_proj": 5, "0.self_attn.v_proj": 2},
    },
    "rslora": {"r": 4, "target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 9}},
    "embedding": {"r": 2, "target_modules": ["q_proj", "embed_tokens"]},
    "head": {"r": 2, "target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "copies": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "copied norms": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "gaussian": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", BY_PEFT)
def test_we_load_peft(case: str, tied: bool, tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=tied)
    expected = saved_by_peft(model, tmp_path / "peft", **BY_PEFT[case])
    adapter = load_adapter(tmp_path / "peft")
    assert_same(merged_logits(model, adapter), expected, model)
    assert set(on_model(adapter, model).tensors) == set(adapter.tensors), "PEFT's copies of base weights are the base's"
    # what was read says the same to lowrank as to PEFT: modules, ranks, alphas
    found = find_targets(model, adapter.config)
    assert {*found.linears, *found.embeddings} == set(adapter.targets)
    assert set(found.copies) == set(adapter.copies)
    assert random_adapter(model, adapter.config).tensors.keys() == adapter.tensors.keys()
    # and it goes back
    save_adapter(tmp_path / "again", adapter, describe_base(model, "tiny"), dtype=None)
    assert_same(logits_in_peft(model, tmp_path / "again"), expected, model)


def test_we_load_peft_on_gpt2(tmp_path: Path) -> None:
    model = make_model("gpt2")
    expected = saved_by_peft(model, tmp_path / "peft", r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    assert_same(merged_logits(model, load_adapter(tmp_path / "peft")), expected, model)


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "embed_tokens"]}]
)
def test_weights_tied_in_peft_are_loaded_as_two_and_it_says_so(settings: dict[str, Any], tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    settings = {"r": 2, "target_modules": ["q_proj"], "ensure_weight_tying": True, **settings}
    expected = saved_by_peft(model, tmp_path / "peft", **settings)
    adapter = load_adapter(tmp_path / "peft")
    assert_same(merged_logits(model, adapter), expected, model)
    assert any("ensure_weight_tying" in note for note in adapter.notes)


def test_a_resized_base_is_told_from_the_original(tmp_path: Path) -> None:
    model = make_model("llama")
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(101)
    saved_by_peft(resized, tmp_path / "peft", r=2, target_modules=["q_proj", "embed_tokens"])
    adapter = load_adapter(tmp_path / "peft")
    assert adapter.base_tensors
    assert not on_model(adapter, resized).base_tensors
    with pytest.raises(
        ModelError,
        match=r"model.embed_tokens.weight: shape \(101, 32\) in the adapter's file, \(97, 32\) in the base; "
        "4 tokens were added .* `lowrank vocab",
    ):
        on_model(adapter, model)
    with pytest.raises(ModelError, match="other values than the base's, and an adapter on it"):
        on_base(adapter, {name: value + 1 for name, value in resized.state_dict().items()}.get)


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_base_is_described_the_same_when_its_layers_are_wrapped(family: str) -> None:
    base = make_base(family)
    before = describe_base(base.model, "tiny")
    last = {"llama": "norm", "gpt2": "ln_f", "mixtral": "norm"}[family]
    bank = Bank(base)
    slot = bank.add(lora.LoraConfig(rank=2, modules_to_save=(f"{base.model.base_model_prefix}.{last}",)), seed=0)
    bank.enable_noise()
    assert describe_base(base.model, "tiny") == before
    assert bool(before.expert_parameters) == (family == "mixtral")
    assert bool(before.transposed) == (family == "gpt2")
    assert set(bank.slots[slot].ranks) <= set(before.module_names)


def test_the_bank_and_peft_agree(tmp_path: Path) -> None:
    """The names here are the bank's: what it trained is loaded by PEFT, and the other way round."""
    base = make_base("llama")
    untouched = make_model("llama")  # the same weights
    bank = Bank(base)
    config = rslora.RsLoraConfig(
        rank=4, target_modules=("q_proj", "up_proj", "embed_tokens"), modules_to_save=("model.norm",)
    )
    slot = bank.add(config, seed=3)
    for parameter in bank.parameters(slot).values():
        parameter.data += 0.1
    adapter = AdapterOnDisk(config, dict(bank.parameters(slot)), bank.slots[slot].ranks)
    save_adapter(tmp_path / "a", adapter, describe_base(base.model, "tiny"), copies=bank.slots[slot].copies, dtype=None)
    detached = AdapterOnDisk(config, {name: value.detach() for name, value in adapter.tensors.items()}, adapter.targets)
    assert_same(logits_in_peft(untouched, tmp_path / "a"), merged_logits(untouched, detached), untouched)
    back = load_adapter(tmp_path / "a")
    other = bank.add(back.config, seed=4)
    bank.load(other, back.tensors)
    assert bank.slots[other].ranks == bank.slots[slot].ranks
    for name, parameter in bank.parameters(slot).items():
        assert torch.equal(bank.parameters(other)[name], parameter)
