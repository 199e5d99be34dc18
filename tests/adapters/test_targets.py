"""Which layers are reached, by PEFT's rules, with PEFT as the oracle."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from lowrank.adapters.bank import Bank
from lowrank.adapters.targets import find_targets
from lowrank.adapters.variants.lora import LoraConfig as Lora
from lowrank.errors import ModelError
from tests.tiny_models import make_base, make_model

REGEX = r"model\.layers\.1\.(self_attn\.[qv]_proj|mlp\.\w+_proj)"
CHOICES: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "longer endings": {"target_modules": ["self_attn.q_proj", "0.mlp.up_proj"]},
    "full names": {"target_modules": ["model.layers.1.self_attn.o_proj"]},
    "regex": {"target_modules": REGEX},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear without some": {
        "target_modules": "all-linear",
        "exclude_modules": ["down_proj", "layers.0.mlp.up_proj"],
    },
    "all-linear without a regex": {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "copies": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "copies of norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "a copy of one norm": {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
    "all-linear but copies": {"target_modules": "all-linear", "modules_to_save": ["q_proj"]},
    "ranks by name": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, "0.mlp.up_proj": 3},
    },
    "ranks by regex": {"target_modules": "all-linear", "rank_pattern": {r"layers\.1\..*_proj": 2, "q_proj": 5}},
    "first pattern wins": {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2, r".*\.1\.self_attn\.q_proj": 7}},
    "alphas": {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 3.0, "1.self_attn.q_proj": 5.0}},
    "ranks and alphas": {
        "target_modules": ["q_proj", "v_proj", "embed_tokens"],
        "rank_pattern": {"v_proj": 4, "embed_tokens": 2},
        "alpha_pattern": {"v_proj": 3.0, "embed_tokens": 1.0},
    },
}


def peft_shapes(family: str, choice: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
    """(shape of each trainable tensor by the name it has on disk, scale of each module) of PEFT's adapter."""
    config = LoraConfig(r=6, lora_alpha=12, **choice)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights and fan_in_fan_out
        twin = get_peft_model(make_model(family), config)
    shapes, scales = {}, {}
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".modules_to_save", "").replace(".default", "")
            shapes[name] = tuple(parameter.shape)
    for name, module in twin.named_modules():
        if isinstance(getattr(module, "scaling", None), dict) and "default" in module.scaling:
            scales[name.removeprefix("base_model.model.")] = module.scaling["default"]
    return shapes, scales


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("choice", CHOICES)
def test_same_tensors_and_scales_as_peft(choice: str, family: str) -> None:
    """Names, ranks, alphas: every trainable tensor by name and shape, every module's scale."""
    expected, scales = peft_shapes(family, CHOICES[choice])
    bank = Bank(make_base(family))
    slot = bank.add(Lora(rank=6, alpha=12, **CHOICES[choice]), seed=0)
    assert {name: tuple(value.shape) for name, value in bank.parameters(slot).items()} == expected
    assert {name: layer.scale for name, layer in bank.slots[slot].layers.items()} == {
        name: scale for name, scale in scales.items() if name in bank.slots[slot].layers
    }
    assert {name: alpha / rank for name, (rank, alpha) in bank.slots[slot].ranks.items()} == scales


@pytest.mark.parametrize("family", ["gpt2", "falcon", "bloom"])
def test_all_linear_of_other_namings(family: str) -> None:
    expected, _ = peft_shapes(family, {"target_modules": "all-linear"})
    bank = Bank(make_base(family))
    slot = bank.add(Lora(rank=6), seed=0)
    assert {name: tuple(value.shape) for name, value in bank.parameters(slot).items()} == expected


@pytest.mark.parametrize("choice", ["all-linear", "head", "copies", "embedding", "copies of norms"])
def test_a_wrapped_model_has_the_same_targets(choice: str) -> None:
    """The second job of the same kind finds what the first one found."""
    base = make_base("llama")
    bank = Bank(base)
    config = Lora(rank=6, **CHOICES[choice])
    before = find_targets(base.model, config)
    bank.add(config, seed=0)
    bank.enable_noise()
    assert find_targets(base.model, config) == before


def test_all_mistakes_at_once_with_suggestions() -> None:
    config = Lora(
        target_modules=("q_prj", "v_proj", "nonsense_xyz"),
        exclude_modules=("dwn_proj",),
        modules_to_save=("lm_heat",),
        rank_pattern={"o_proj": 4},
        alpha_pattern={"v_prj": 4.0},
    )
    with pytest.raises(ModelError) as caught:
        find_targets(make_model("llama"), config)
    text = str(caught.value)
    assert "target_modules: 'q_prj'; did you mean 'q_proj'?" in text
    assert re.search(r"target_modules: 'nonsense_xyz'; known: .*down_proj.*embed_tokens.*lm_head", text)
    assert "exclude_modules: 'dwn_proj'; did you mean 'down_proj'?" in text
    assert "modules_to_save: 'lm_heat'; did you mean 'lm_head'?" in text
    assert "rank_pattern: 'o_proj' matches no target" in text
    assert "alpha_pattern: 'v_prj' matches no target; did you mean 'v_proj'?" in text
    assert "'v_proj';" not in text
    assert text.count("\n  - ") == 6


@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules"])
def test_a_regex_that_matches_nothing(setting: str) -> None:
    with pytest.raises(ModelError, match=rf"{setting}: 'q_proj' matches no layer; known: down_proj"):
        find_targets(make_model("llama"), Lora(**{setting: "q_proj"}))  # a full match of the full name


def test_nothing_left_after_excluding() -> None:
    with pytest.raises(ModelError, match="exclude_modules leaves nothing of target_modules to train"):
        find_targets(make_model("llama"), Lora(exclude_modules=r".*"))
    with pytest.raises(ModelError, match="q_proj"):
        find_targets(make_model("llama"), Lora(target_modules=("q_proj",), exclude_modules=("q_proj",)))


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
def test_a_thawed_part_that_no_target_is_in_is_named(targets: Any) -> None:
    model = make_model("llama")
    missed = find_targets(model, Lora(target_modules=targets, freeze_vision_tower=False)).unmatched_note
    assert missed is not None
    assert "adapter.freeze_vision_tower: false has no effect" in missed
    assert find_targets(model, Lora(target_modules=targets)).unmatched_note is None


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
def test_a_frozen_language_model_without_a_tower_leaves_nothing(targets: Any) -> None:
    config = Lora(target_modules=targets, freeze_language_model=True, freeze_vision_tower=False)
    with pytest.raises(ModelError, match="freeze_language_model: true leaves nothing to train"):
        find_targets(make_model("llama"), config)
