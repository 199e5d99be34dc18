"""An adapter saved by PEFT, trained on here, saved by us and loaded by PEFT says what it said here.

The configurations are those with which PEFT 0.21 tests LoRA on causal language models (its test_decoder_models.py,
test_custom_models.py and test_initialization.py); what is not read is refused by its name.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from lowrank.adapters.bank import Bank
from lowrank.checkpoints.base_tensors import on_model
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import AdapterOnDisk, load_adapter, save_adapter
from lowrank.compat.unsloth import FastLanguageModel
from lowrank.errors import ModelError
from lowrank.models.base import Base
from lowrank.models.checks.isolation import choose_layout
from lowrank.models.loading.pretrained import locate
from lowrank.objectives.sft import SFTConfig
from lowrank.segments import Segment, number_the_step
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.tiny_models import VOCABULARY, make_model

TOKENS = torch.tensor([[5, 9, 3, 17, 4]])
TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "mistral": ["q_proj", "v_proj"],
    "gemma3": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "opt": ["q_proj", "v_proj"],
}
"""By family, as PEFT's own defaults have them."""
EMBEDDING = {"gpt2": "wte"}
RUN: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none"},
    "no arguments": {},
    "trainable tokens": {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "trainable_token_indices": [0, 1, 3]},
    "dora": {"r": 4, "use_dora": True},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora and rslora": {"r": 4, "lora_alpha": 6, "use_dora": True, "use_rslora": True},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "regex": {"r": 2, "target_modules": r".*\.1\..*(_proj|fc\d|c_attn|c_fc)"},
    "exclude": {"r": 2, "target_modules": "all-linear", "exclude_modules": r".*(mlp|fc).*"},
    "layers": {"r": 2, "layers_to_transform": [0]},
    "patterns": {"r": 4, "rank_pattern": {"TARGET": 2}, "alpha_pattern": {"TARGET": 3}},
    "embedding": {"r": 2, "target_modules": ["TARGET", "EMBEDDING"]},
    "copies": {"r": 2, "modules_to_save": ["lm_head"]},
    "gaussian": {"r": 2, "init_lora_weights": "gaussian"},
    "random": {"r": 2, "init_lora_weights": False},
    "orthogonal": {"r": 2, "init_lora_weights": "orthogonal"},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "activated": ({"r": 8, "alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "bias of its layers": ({"r": 4, "bias": "lora_only"}, "bias: 'lora_only'"),
    "all biases": ({"r": 4, "bias": "all"}, "bias: 'all'"),
    "lora_bias": ({"r": 4, "lora_bias": True}, "lora_bias"),
    "pissa": ({"r": 4, "init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
    "olora": ({"r": 4, "init_lora_weights": "olora"}, "init_lora_weights: 'olora'"),
    "replicated layers": ({"r": 4, "layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
}
KINDS: dict[str, Any] = {
    "LN_TUNING": peft.LNTuningConfig(target_modules=["norm"]),
    "BOFT": peft.BOFTConfig(boft_block_size=4),
    "FOURIERFT": peft.FourierFTConfig(n_frequency=10),
    "RANDLORA": peft.RandLoraConfig(r=8, randlora_alpha=1),
    "SHIRA": peft.ShiraConfig(r=1),
}
"""Methods that lowrank does not have."""
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adalora": (peft.AdaLoraConfig, {"total_step": 1}),
    "miss": (peft.MissConfig, {"r": 2}),
    "hra": (peft.HRAConfig, {}),
    "ia3": (peft.IA3Config, {}),
    "oft": (peft.OFTConfig, {}),
    "prefix tuning": (peft.PrefixTuningConfig, {"num_virtual_tokens": 10}),
    "p-tuning": (peft.PromptEncoderConfig, {"num_virtual_tokens": 10, "encoder_hidden_size": 32}),
    "prompt tuning": (peft.PromptTuningConfig, {"num_virtual_tokens": 10}),
    "vera": (
        peft.VeraConfig,
        {"r": 8, "vera_dropout": 0.05, "projection_prng_key": 0xFF, "d_initial": 0.1, "save_projection": True},
    ),
}
"""The other methods of PEFT's ALL_CONFIGS (test_decoder_models.py) that are here, with the settings there."""
READ = {
    "ADALORA", "HRA", "IA3", "LOHA", "LOKR", "LORA", "MISS", "OFT", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING",
    "VERA",
}  # fmt: skip
TOKEN = torch.tensor([[5, 9, 11, 3, 8], [7, 7, 4, 60, 90]])


@pytest.fixture(autouse=True)
def _peft_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def settings_for(family: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """With the family's names for what stands in capitals."""
    own = TARGETS[family]
    names = {"TARGET": own[0], "EMBEDDING": EMBEDDING.get(family, "embed_tokens")}
    put = {
        key: [names.get(each, each) for each in value] if isinstance(value, list) and key == "target_modules" else value
        for key, value in settings.items()
    }
    put = {
        key: {names.get(name, name): each for name, each in value.items()} if isinstance(value, dict) else value
        for key, value in put.items()
    }
    return {"target_modules": own, "fan_in_fan_out": family == "gpt2", **put}


def saved_by_peft(model: Any, config: Any, folder: Path) -> None:
    """Random numbers in every trained tensor."""
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    adapted.save_pretrained(str(folder))


def rows() -> list[Segment]:
    generator = np.random.default_rng(0)
    weight_L = np.concatenate([np.zeros(3), np.ones(9)]).astype(np.float32)
    return number_the_step([Segment(generator.integers(0, VOCABULARY, 12), weight_L) for _ in range(4)])


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("family", TARGETS)
def test_saved_by_peft_trained_on_here_and_back(family: str, name: str, tmp_path: Path) -> None:
    there_and_back(family, peft.LoraConfig(task_type="CAUSAL_LM", **settings_for(family, RUN[name])), tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_their_other_methods_too(name: str, tmp_path: Path) -> None:
    kind, settings = METHODS[name]
    there_and_back("llama", kind(task_type="CAUSAL_LM", **settings), tmp_path)


def there_and_back(family: str, config: Any, tmp_path: Path) -> None:
    model = make_model(family, torch.float32)
    saved_by_peft(model, config, tmp_path / "theirs")
    base = Base(copy.deepcopy(model), None, family)
    choose_layout(base, "auto")
    engine = Engine(base, Bank(base), 64)
    read = on_model(load_adapter(tmp_path / "theirs"), base.model)
    slot = engine.bank.add(read.config, seed=0)
    engine.bank.load(slot, read.tensors)
    before = log_probabilities(engine, slot)
    torch.testing.assert_close(before, of_peft(model, tmp_path / "theirs"), rtol=0, atol=1e-5)
    engine.add(slot, SFTConfig().build(), AdamWConfig(learning_rate=0.01), seed=0, neftune_alpha=0.0)
    for _ in range(2):
        engine.forward_backward({slot: rows()})
        engine.optim_step(slot, 0.01)
    after = log_probabilities(engine, slot)
    assert (after - before).abs().max() > 1e-3, "nothing was learned"
    ours = engine.bank.saved(slot)
    save_adapter(tmp_path / "ours", AdapterOnDisk(ours.config, ours.tensors, ours.ranks), describe_base(model, family))
    torch.testing.assert_close(of_peft(model, tmp_path / "ours"), after, rtol=0, atol=1e-5)


def log_probabilities(engine: Engine, slot: int) -> torch.Tensor:
    """(rows, place): of each token from those before it."""
    weight_L = np.array([0, 1, 1, 1, 1], np.float32)
    scored = engine.logprobs(slot, [Segment(row.numpy(), weight_L) for row in TOKEN])
    return torch.from_numpy(np.stack(scored))[:, 1:]


@torch.no_grad()
def of_peft(model: Any, folder: Path) -> torch.Tensor:
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
    all_BLV = loaded(TOKEN).logits[:, -TOKEN.shape[1] : -1].log_softmax(-1)  # past virtual tokens
    return all_BLV.gather(2, TOKEN[:, 1:, None])[..., 0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    settings, problem = REFUSED[name]
    family = "opt" if "bias" in settings else "llama"
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings_for(family, settings))
    saved_by_peft(make_model(family, torch.float32), config, tmp_path / "theirs")
    with pytest.raises(ModelError) as caught:
        load_adapter(tmp_path / "theirs")
    assert problem in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_methods_that_are_not_there_are_refused_by_their_name(kind: str, tmp_path: Path) -> None:
    config = copy.deepcopy(KINDS[kind])
    config.task_type = "CAUSAL_LM"
    saved_by_peft(make_model("llama", torch.float32), config, tmp_path / "theirs")
    with pytest.raises(ModelError, match=f"peft_type is '{kind}'; lowrank reads"):
        load_adapter(tmp_path / "theirs")


@pytest.mark.parametrize("kind", sorted({each.value for each in peft.PeftType} - READ))
def test_every_other_method_of_pefts_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    saved_by_peft(make_model("llama", torch.float32), peft.LoraConfig(target_modules=["q_proj"]), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": kind}))
    with pytest.raises(ModelError, match=f"peft_type is '{kind}'; lowrank reads"):
        load_adapter(tmp_path)


def test_x_lora_is_refused_by_its_name(tmp_path: Path) -> None:
    model = make_model("llama", torch.float32)
    saved_by_peft(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings_for("llama", {"r": 2})), tmp_path / "one")
    model.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, adapters={"0": str(tmp_path / "one")}
    )
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "mixed"))
    with pytest.raises(ModelError, match="peft_type is 'XLORA'; lowrank reads"):
        load_adapter(tmp_path / "mixed")


def test_peft_s_functions_on_state_dicts_work_on_our_model(tmp_path: Path) -> None:
    """Both ways, between a model of ours as its users hold it and PEFT's own."""
    ours, _ = FastLanguageModel.from_pretrained("lowrank/tiny", load_in_4bit=False, dtype=torch.float32)
    ours = FastLanguageModel.get_peft_model(ours, r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    state = peft.get_peft_model_state_dict(ours)
    plain = transformers.AutoModelForCausalLM.from_pretrained(locate("lowrank/tiny"), dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(plain, config)
    assert peft.get_peft_model_state_dict(theirs).keys() == state.keys()
    found = peft.set_peft_model_state_dict(theirs, state)
    assert not found.unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(TOKENS).logits, ours.eval()(TOKENS).logits, rtol=0, atol=1e-5)
        for name, value in theirs.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.1)
        assert not peft.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs)).unexpected_keys
        ours.train().eval()  # the copies that compute are those of the last pass until something can have changed
        torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, rtol=0, atol=1e-5)
