"""Models with towers for pictures or sound, tuned on text: loaded whole, trained as PEFT does, and saved so that every
tensor arrives on the class that is served."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from packaging.version import Version

from lowrank.adapters.bank import Bank
from lowrank.adapters.targets import find_targets
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import pack
from lowrank.checkpoints.base_tensors import on_model
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import AdapterOnDisk, load_adapter, save_adapter
from lowrank.models.checks.kv_cache import kv_cache_mismatch
from lowrank.models.config import ModelConfig
from lowrank.models.layers import Parts, decoder_layers, is_outside, language_model
from lowrank.models.loading.pretrained import load
from lowrank.models.native_masks import prompt_type_of
from lowrank.pipelines.adapter_on_base import on_base_of
from lowrank.segments import Segment
from tests.peft_oracle import peft_twin, plain_loss
from tests.tiny_composites import COMPOSITES, make_composite, save_composite_folder
from tests.tiny_models import make_engine, random_step

PADDED = {"qwen3_5", "llama4"}
"""Linear attention, and chunks that the mask alone knows: as of their text models."""
REPRESENTATIVE = ("qwen2_5_vl", "qwen3_5", "llava", "gemma3", "gemma4", "idefics3", "qwen2_audio", "paligemma")
FLOAT32_INSIDE = {"gemma3", "gemma4", "paligemma", "paligemma2"}
NO_FLOAT64 = {"llama4"}
"""Its rotations are complex numbers, which a cast to float64 makes real."""
BROKEN_ON_TEXT = {"llama4"} if Version(transformers.__version__) < Version("5.30") else set[str]()
"""transformers' composite class fails without a picture; the language model in it does not."""
PREFIX_LM = {"paligemma", "paligemma2"}
"""They read prompts both ways, so no questions are read piece by piece."""
families = pytest.mark.parametrize(
    "family",
    [family if family in REPRESENTATIVE else pytest.param(family, marks=pytest.mark.slow) for family in COMPOSITES],
)


def loaded(folder: Path, dtype: str = "float64", **settings: Any) -> Any:
    return load(ModelConfig(path=str(folder), dtype=dtype, device="cpu", **settings), notify=lambda _: None)


@families
def test_text_trains_like_peft_and_every_tensor_arrives(family: str, tmp_path: Path) -> None:
    dtype = torch.float32 if family in NO_FLOAT64 else torch.float64
    base = loaded(save_composite_folder(tmp_path / "model", family), str(dtype).removeprefix("torch."))
    assert type(base.model) is type(make_composite(family))
    assert base.layout == ("padded" if family in PADDED else "packed")
    assert (kv_cache_mismatch(base) is None) == (base.layout == "packed" and family not in PREFIX_LM)
    assert base.prompt_type == prompt_type_of(base.model) == (0 if family in PREFIX_LM else None)
    engine, slots = make_engine(base, LoraConfig(rank=2), LoraConfig(rank=4, alpha=8), learning_rate=1e-2)
    ours = engine.bank.parameters(slots[1])
    targets = sorted({name.partition(".lora_")[0] for name in ours})
    language, _ = language_model(base.model)
    assert not [name for name in targets if is_outside(name, language)]
    twin, theirs = peft_twin(
        make_composite(family, dtype), ours, r=4, lora_alpha=8, target_modules="|".join(targets).replace(".", r"\.")
    )
    optimizer = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.0)
    tolerance = 1e-5 if family in FLOAT32_INSIDE | NO_FLOAT64 else 1e-9
    for step in range(2):
        work = {slot: with_prompts(random_step(10 * step + slot, [5 + slot, 9, 14])) for slot in slots}
        loss = plain_loss(_that_writes(twin, family), work[slots[1]], prompt_type=base.prompt_type)
        loss.backward()
        assert all(parameter.grad is not None for parameter in theirs.values())
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        forwarded = engine.forward_backward(work)
        for slot in slots:
            engine.optim_step(slot, 1e-2)
        assert forwarded[slots[1]].loss == pytest.approx(loss.item(), abs=tolerance)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=10 * tolerance)
    served = _served_by_peft(save(engine.bank, slots[1], tmp_path / "adapter"), family, dtype)
    token_1T = torch.from_numpy(random_step(3, [11])[0].token_L)[None]
    with torch.no_grad():
        one, other = (_that_writes(each, family)(input_ids=token_1T).logits for each in (served, twin))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def with_prompts(segments: list[Segment]) -> list[Segment]:
    """Of the first nothing is learned before its middle, of the second everything but the first token."""
    first, second, *others = segments
    learned = [np.arange(len(each)) >= begin for each, begin in ((first, len(first) // 2), (second, 1))]
    own = [replace(each, weight_L=np.float32(found)) for each, found in zip((first, second), learned)]
    return [*own, *others]


def _that_writes(twin: Any, family: str) -> Any:
    return twin.base_model.model.language_model if family in BROKEN_ON_TEXT else twin


def save(bank: Bank, slot: int, folder: Path) -> Path:
    own = bank.slots[slot]
    adapter = AdapterOnDisk(own.config, dict(bank.parameters(slot)), own.ranks)
    save_adapter(folder, adapter, describe_base(bank.base.model, bank.base.name), dtype=None)
    return folder


def _served_by_peft(folder: Path, family: str, dtype: torch.dtype) -> Any:
    """PEFT warns of every tensor that has no place in the base, and of every place that gets none."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        base: Any = transformers.AutoModelForMultimodalLM.from_pretrained(folder.parent / "model", dtype=dtype)
        assert type(base) is type(make_composite(family))
        return peft.PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False).eval()


def test_the_card_names_the_class_that_loads_it(tmp_path: Path) -> None:
    """And asks about no picture where the base comes without the files of its processor."""
    folder = save_composite_folder(tmp_path / "model", "llava")
    (folder / "preprocessor_config.json").unlink()
    base = loaded(folder, "float32")
    engine, (slot,) = make_engine(base, LoraConfig(rank=2))
    card = (save(engine.bank, slot, tmp_path / "adapter") / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    code = code.replace("path/of/the/base", base.name).replace("path/of/this/folder", str(tmp_path / "adapter"))
    made: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        exec(code, made)
    assert "AutoProcessor" not in code
    assert type(made["base"]) is transformers.LlavaForConditionalGeneration
    assert made["model"].peft_config["default"].r == 2


def test_all_linear_says_what_it_leaves_out_and_a_tower_is_reached_by_name(tmp_path: Path) -> None:
    base = loaded(save_composite_folder(tmp_path / "model", "gemma3"), "float32")
    bank = Bank(base)
    slot = bank.slots[bank.add(LoraConfig(rank=2), seed=0)]
    assert slot.unmatched_note == (
        "beside its language model this base has vision_tower (12 linear layers) for what is not text: all-linear "
        "leaves them as they are (adapter.freeze_vision_tower and freeze_multi_modal_projector: false reach those for "
        "pictures and sounds)"
    )
    named = bank.slots[bank.add(LoraConfig(rank=2, target_modules=r".*vision_tower.*q_proj"), seed=0)]
    assert [name.partition(".layers")[0] for name in named.ranks] == ["model.vision_tower.encoder"] * 2


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma4"])
def test_parts_that_are_not_frozen_are_reached_by_all_linear_and_by_names(family: str, tmp_path: Path) -> None:
    base = loaded(save_composite_folder(tmp_path / "model", family), "float32")
    parts = Parts(base.model)

    def reached(**settings: Any) -> set[str]:
        return {parts.of(name) for name in find_targets(base.model, LoraConfig(**settings)).linears}

    assert reached() == {"language_model"}
    assert reached(freeze_vision_tower=False) == {"language_model", "vision_tower"}
    assert reached(freeze_multi_modal_projector=False, freeze_language_model=True) == {"multi_modal_projector"}
    if family == "llava":  # both have layers of this name
        named: dict[str, Any] = {"target_modules": ["q_proj"]}
        assert reached(**named) == {"language_model"}
        assert reached(**named, freeze_vision_tower=False) == {"language_model", "vision_tower"}
        assert reached(**named, freeze_vision_tower=False, freeze_language_model=True) == {"vision_tower"}
    with pytest.raises(ValueError, match="nothing is left to adapt"):
        LoraConfig(freeze_language_model=True)
    with pytest.raises(ValueError, match="says itself what it reaches"):
        LoraConfig(target_modules=".*q_proj", freeze_vision_tower=False)


def test_names_mean_the_language_model_where_both_have_them(tmp_path: Path) -> None:
    base = loaded(save_composite_folder(tmp_path / "model", "gemma3"), "float32")

    def reached(*names: str) -> set[str]:
        targets = find_targets(base.model, LoraConfig(target_modules=names))
        return {name.partition(".layers")[0] for name in targets.linears}

    assert reached("q_proj", "v_proj") == {"model.language_model"}
    assert reached("out_proj", "fc1") == {"model.vision_tower.encoder"}
    assert reached("q_proj", "fc1") == {"model.language_model", "model.vision_tower.encoder"}
    assert reached("model.vision_tower.encoder.layers.0.self_attn.q_proj") == {"model.vision_tower.encoder"}


def test_full_tuning_leaves_the_tower_as_it_is(tmp_path: Path) -> None:
    notices: list[str] = []
    config = ModelConfig(path=str(save_composite_folder(tmp_path / "model", "llava")), dtype="float32", device="cpu")
    base = load(config, train_all=True, notify=notices.append)
    trained = {name for name, parameter in base.model.named_parameters() if parameter.requires_grad}
    assert {name.partition(".layers")[0] for name in trained} == {
        "model.language_model", "model.language_model.embed_tokens.weight", "model.language_model.norm.weight",
        "lm_head.weight",
    }  # fmt: skip
    assert any(
        "what this base has beside it for what is not text stays: vision_tower (" in sentence for sentence in notices
    )


def test_an_adapter_of_the_text_class_arrives(tmp_path: Path) -> None:
    """TRL and PEFT on `AutoModelForCausalLM` train Qwen3.5's text class, whose layers have other names."""
    folder = save_composite_folder(tmp_path / "model", "qwen3_5")
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert type(plain) is transformers.Qwen3_5ForCausalLM
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        twin = peft.get_peft_model(plain, settings, autocast_adapter_dtype=False).eval()
        twin.save_pretrained(tmp_path / "adapter")
    base = loaded(folder)
    saved = on_model(load_adapter(tmp_path / "adapter"), base.model)
    assert saved.notes[-1] == "it was trained on the language model alone; here that is model.language_model"
    bank = Bank(base)
    slot = bank.add(saved.config, seed=0)
    bank.load(slot, saved.tensors)
    segment = random_step(3, [11])[0]
    with torch.no_grad():
        wanted_TV = twin(input_ids=torch.from_numpy(segment.token_L)[None]).logits[0]
        logits_TV = bank.head(slot).logits(bank.hidden(pack([(slot, segment)])))
        bare_TV = bank.head(slot).logits(bank.hidden(pack([(-1, segment)])))
    torch.testing.assert_close(logits_TV, wanted_TV, rtol=0, atol=1e-6)
    assert (wanted_TV - bare_TV).abs().max() > 1e-3
    there = on_base_of(load_adapter(tmp_path / "adapter"), ModelConfig(path=str(folder)))
    assert there.targets == saved.targets


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_the_tower_stays_in_sixteen_bit_unless_asked(family: str, tmp_path: Path) -> None:
    folder = save_composite_folder(tmp_path / "model", family)
    kinds = []
    for towers in (False, True):
        base = loaded(folder, "float32", storage={"type": "nf4", "towers": towers})
        language, _ = language_model(base.model)
        packed = [name for name, module in base.model.named_modules() if hasattr(module, "dense_weight")]
        kinds.append({is_outside(name, language) for name in packed})
        assert len(packed) > 10
    assert kinds == [{False}, {False, True}]


@families
def test_one_stack_of_decoder_layers(family: str) -> None:
    layers = decoder_layers(make_composite(family))
    assert layers is not None
    assert len(layers) == 2
    assert layers is language_model(make_composite(family))[1].layers or "Vision" not in type(layers[0]).__name__


def test_towers_keep_their_own_attention(tmp_path: Path) -> None:
    base = loaded(save_composite_folder(tmp_path / "model", "qwen2_5_vl"), "float32")
    assert base.model.config.text_config._attn_implementation == "lowrank_packed"
    assert base.model.config.vision_config._attn_implementation == "sdpa"
    with base.using_attention("eager"):
        assert base.model.config.vision_config._attn_implementation == "sdpa"
    assert base.model.config.text_config._attn_implementation == "lowrank_packed"
