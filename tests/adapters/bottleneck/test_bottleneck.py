"""The contract of bottleneck adapters, AdapterHub's library `adapters` as oracle: see make_with_adapterhub.py."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lowrank.adapters.bank import Bank
from lowrank.adapters.bottleneck import BottleneckSettings
from lowrank.adapters.routing import ForwardContext
from lowrank.adapters.variants.houlsby import HoulsbyConfig
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.adapters.variants.parallel import ParallelConfig
from lowrank.adapters.variants.pfeiffer import PfeifferConfig
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import load_adapter, save_adapter
from lowrank.errors import ConfigError, ModelError
from lowrank.export.targets.lora_gguf import LoraGGUFExportConfig
from lowrank.export.targets.merged import MergedExportConfig
from lowrank.export.targets.peft import PeftExportConfig
from lowrank.generate.request import GenerationConfig, Prompt
from lowrank.generate.sampler import generate
from lowrank.models.base import Base
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.checks.isolation import choose_layout
from lowrank.models.config import ModelConfig
from lowrank.planning.memory import StepMemory
from lowrank.segments import Segment
from lowrank.settings import configs_in
from tests.adapters.isolation import assert_isolated
from tests.adapters.peft_twins import moved, on_disk
from tests.export.sources import source_of
from tests.planning.test_memory import folder_of, measured, planned
from tests.tiny_models import make_base, make_engine, make_model, random_step

FIXTURES = Path(__file__).parent / "fixtures"
TOKEN = torch.tensor([[5, 9, 11, 3, 8], [7, 7, 4, 20, 30]])
CASES = sorted(path.name for path in (FIXTURES / "llama").iterdir() if path.is_dir() and path.name != "base")
VARIANTS: dict[str, Any] = {
    name: config(reduction_factor=4)
    for name, config in configs_in("lowrank.adapters.variants").items()
    if issubclass(config, BottleneckSettings)
}
STORAGES = ("int8", "nf4", "fp4", "hqq")
slow = pytest.mark.slow
every_variant = pytest.mark.parametrize("name", VARIANTS)


def base_of(family: str) -> Base:
    model = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / family / "base", dtype=torch.float64)
    base = Base(model.eval().requires_grad_(False), None, family)
    choose_layout(base, "auto")
    return base


def logits(bank: Bank, slot: int) -> torch.Tensor:
    routed = bank.routing.using(ForwardContext(TOKEN.numel(), ((slot, 0, TOKEN.numel()),)))
    with routed, bank.base.using_attention(bank.base.own_attention):
        return bank.base.model(TOKEN).logits


def test_every_variant_is_there() -> None:
    assert VARIANTS.keys() == {"houlsby", "pfeiffer", "parallel"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_adapterhubs(case: str, family: str) -> None:
    """Their file on their base, between other slots."""
    expected = load_file(FIXTURES / family / f"{case}.safetensors")
    saved = load_adapter(FIXTURES / family / case)
    bank: Any = Bank(base_of(family))
    bank.add(LoraConfig(rank=2), seed=0)
    slot = bank.add(saved.config, seed=0)
    moved(bank, bank.add(LoraConfig(rank=2), seed=0))
    bank.load(slot, saved.tensors)
    ours = logits(bank, slot)
    torch.testing.assert_close(ours, expected["logits"], rtol=1e-5, atol=1e-5)
    assert (ours - logits(bank, -1)).abs().max() > 1e-2
    own = bank.parameters(slot)
    gradients = torch.autograd.grad(ours.pow(2).sum(), list(own.values()))
    for name, gradient in zip(own, gradients):
        place, _, part = name.partition("_adapters.")
        theirs = expected[f"{place}_adapters.adapters.{case}.{part}"]
        torch.testing.assert_close(gradient, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()), msg=name)
    assert len(own) == len(expected) - 1


@every_variant
def test_files_are_adapterhubs_and_ours(name: str, tmp_path: Path) -> None:
    bank = Bank(make_base("llama"))
    slot = bank.add(VARIANTS[name], seed=3)
    moved(bank, slot)
    save_adapter(tmp_path / "a", on_disk(bank, slot), describe_base(bank.base.model, "llama"), dtype=None)
    theirs = FIXTURES / "llama" / name
    ours, fields = (
        json.loads((folder / "adapter_config.json").read_text())["config"] for folder in (tmp_path / "a", theirs)
    )
    assert ours.keys() <= fields.keys()
    assert {key: fields[key] for key in ours} == ours
    names = {key.replace(f".{name}.", ".lowrank.") for key in load_file(theirs / "adapter.safetensors")}
    assert load_file(tmp_path / "a" / "adapter.safetensors").keys() == names
    saved = load_adapter(tmp_path / "a")
    assert saved.config == VARIANTS[name]
    again = Bank(make_base("llama"))
    other = again.add(saved.config, seed=9)
    again.load(other, saved.tensors)
    for key, value in bank.parameters(slot).items():
        assert torch.equal(value, again.parameters(other)[key]), key
    assert torch.equal(logits(bank, slot), logits(again, other))
    assert f"A `{name} /4` adapter" in (tmp_path / "a" / "README.md").read_text()
    assert "adapters.init(model)" in (tmp_path / "a" / "README.md").read_text()


def test_starts_near_the_base() -> None:
    bank = Bank(make_base("llama"))
    slots = {name: bank.add(config, seed=0) for name, config in VARIANTS.items()}
    bare = logits(bank, -1)
    assert torch.equal(logits(bank, slots["parallel"]), bare)
    for name in ("houlsby", "pfeiffer"):
        assert 0 < (logits(bank, slots[name]) - bare).abs().max() < 0.05 * bare.abs().max()
    one, other = bank.add(VARIANTS["houlsby"], seed=0), bank.add(VARIANTS["houlsby"], seed=1)
    assert torch.equal(logits(bank, one), logits(bank, slots["houlsby"]))
    assert not torch.equal(logits(bank, one), logits(bank, other))


@pytest.mark.parametrize("family", ["llama", *(pytest.param(each, marks=slow) for each in ("gemma2", "phi", "lfm2"))])
@every_variant
def test_neighbors_do_not_see_it(name: str, family: str) -> None:
    """Losses and gradients of all jobs, together in small pieces and alone, with dropout; NaN stays in its slot."""
    config = VARIANTS[name].model_copy(update={"dropout": 0.2})
    engine, slots = make_engine(make_base(family), LoraConfig(rank=4), config, LoraConfig(rank=2), config)
    for slot in slots:
        moved(engine.bank, slot, 0.1)
    work = {slot: random_step(slot, [5 + slot, 9, 14, 3]) for slot in slots}
    loss, rtol, atol = (1e-12, 1e-8, 1e-11) if family == "llama" else (1e-6, 1e-3, 1e-5)
    grads = assert_isolated(engine, slots, work, loss=loss, rtol=rtol, atol=atol)
    assert set(grads[slots[1]]) == set(engine.bank.parameters(slots[1]))


@pytest.mark.parametrize("activation_checkpointing", ["full", "sqrt", "selective"])
def test_recomputed_layers_give_the_same_gradients(activation_checkpointing: str) -> None:
    configs = [config.model_copy(update={"dropout": 0.1}) for config in VARIANTS.values()]
    engine, slots = make_engine(make_base("llama"), *configs)
    work = {slot: random_step(slot, [5, 9, 14]) for slot in slots}
    kept = []
    for how in ("none", activation_checkpointing):
        set_activation_checkpointing(engine.base.model, how)
        engine.forward_backward(work)
        kept.append([p.grad.clone() for slot in slots for p in engine.bank.parameters(slot).values()])  # type: ignore
        for slot in slots:
            engine.jobs[slot].optimizer.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*kept))


@pytest.mark.parametrize("storage", STORAGES)
def test_on_every_storage(storage: str) -> None:
    """As on a dense base of the weights that the storage gives."""
    wrap = configs_in("lowrank.models.storages")[storage]().wrap  # type: ignore[attr-defined]
    found = []
    for packed in (True, False):
        model = make_model("llama", torch.float32)
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                layer = wrap(module)
                if packed:
                    model.set_submodule(name, layer)
                else:
                    module.weight.copy_(layer.dense_weight())
        base = Base(model, None, "llama")
        choose_layout(base, "auto")
        engine, slots = make_engine(base, *VARIANTS.values(), LoraConfig(rank=2))
        work = {slot: random_step(slot, [5, 9, 14]) for slot in slots}
        losses = [described.loss for described in engine.forward_backward(work).values()]
        found.append((losses, [p.grad for slot in slots[:3] for p in engine.bank.parameters(slot).values()]))
    (losses, grads), (dense_losses, dense_grads) = found
    assert losses == pytest.approx(dense_losses, abs=1e-5)
    for one, other in zip(grads, dense_grads):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@every_variant
def test_answers_with_a_cache_are_those_without(name: str) -> None:
    engine, (lora, slot) = make_engine(make_base("llama"), LoraConfig(rank=4), VARIANTS[name])
    moved(engine.bank, slot, 0.1)
    token_L = np.array([5, 9, 11, 3, 8, 7])
    alone = token_L.tolist()
    for _ in range(8):
        routed = engine.bank.routing.using(ForwardContext(len(alone), ((slot, 0, len(alone)),)))
        with routed, engine.base.using_attention(engine.base.own_attention), torch.no_grad():
            alone.append(int(engine.base.model(torch.tensor([alone])).logits[0, -1].argmax()))
    prompts = [Prompt(token_L, each) for each in (slot, -1, lora)]
    answers = generate(engine.base, engine.bank, prompts, GenerationConfig(max_new_tokens=8), stop_tokens=frozenset())
    assert answers[0] == alone[6:]
    assert answers[1] != answers[0]


@pytest.mark.parametrize("name", ["houlsby", *(pytest.param(each, marks=slow) for each in ("pfeiffer", "parallel"))])
def test_a_planned_step_is_a_real_step(name: str, tmp_path: Path) -> None:
    settings = folder_of("llama", tmp_path)
    jobs = planned(LoraConfig(rank=4), VARIANTS[name], lengths=[16, 20, 9])
    static, peak = measured(settings, jobs, 4096, "none")
    step = StepMemory(settings, jobs).step(4096, "none")
    assert step.base + step.adapters == pytest.approx(static, rel=0.03)
    assert step.total - step.static == pytest.approx(peak, rel=0.1)


def test_a_freed_slot_is_free() -> None:
    bank = Bank(make_base("llama"))
    slot = bank.add(VARIANTS["houlsby"], seed=0)
    bare = logits(bank, -1)
    bank.remove(slot)
    assert torch.equal(logits(bank, slot), bare)
    assert bank.add(VARIANTS["pfeiffer"], seed=0) == slot


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        (HoulsbyConfig, {"mh_adapter": False, "output_adapter": False}, "nothing to train"),
        (HoulsbyConfig, {"reduction_factor": 0}, "a number above 0"),
        (HoulsbyConfig, {"reduction_factor": {"1": float("nan")}}, r"reduction_factor.*finite number"),
        (PfeifferConfig, {"scaling": float("inf")}, "finite number"),
        (PfeifferConfig, {"non_linearity": "sine"}, "'sine' is not among"),
        (ParallelConfig, {"original_ln_after": False}, "would leave out the stream"),
        (HoulsbyConfig, {"modules_to_save": ("lm_head",)}, "modules_to_save: "),
    ],
)
def test_settings_that_make_no_sense(config: Any, given: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){expected}"):
        config(**given)


def test_models_of_another_make_are_refused() -> None:
    for family, why in (("bloom", "add the stream around them themselves"), ("opt", "are no attention and MLP")):
        with pytest.raises(ModelError, match=f"{why}; use lora"):
            Bank(make_base(family)).add(VARIANTS["houlsby"], seed=0)
    bank: Any = Bank(make_base("llama"))
    with pytest.raises(ModelError, match="leaves no layer"):
        bank.add(HoulsbyConfig(leave_out=(0, 1)), seed=0)
    with pytest.raises(ModelError, match="names neither layer 0 nor a default"):
        bank.add(HoulsbyConfig(reduction_factor={"1": 4}), seed=0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"phm_layer": True}, r"config\.phm_layer: Compacter's hypercomplex layers are not there"),
        ({"use_gating": True}, "would let the future speak into the past"),
        ({"architecture": "lora"}, "config.architecture is 'lora'"),
        ({"reduction_factor": "many"}, r"config\.reduction_factor: .*got 'many'"),
        ({"reduction_factor": -1}, "a number above 0"),
        ({"residual_before_ln": "post_add"}, r"config\.residual_before_ln"),
        ({"frobnicate": 1}, r"config\.frobnicate: 1 is not known"),
    ],
)
def test_files_that_cannot_be_used(fields: dict[str, Any], expected: str, tmp_path: Path) -> None:
    theirs = FIXTURES / "llama" / "pfeiffer"
    described = json.loads((theirs / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**described, "config": {**described["config"], **fields}})
    )
    save_file(load_file(theirs / "adapter.safetensors"), tmp_path / "adapter.safetensors")
    with pytest.raises(ModelError, match=expected):
        load_adapter(tmp_path)


def test_pickles_are_refused_and_so_are_other_tensors(tmp_path: Path) -> None:
    theirs = FIXTURES / "llama" / "pfeiffer"
    (tmp_path / "adapter_config.json").write_text((theirs / "adapter_config.json").read_text())
    with pytest.raises(ModelError, match=r"no adapter\.safetensors"):
        load_adapter(tmp_path)
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ModelError, match="a pickle, which can run code"):
        load_adapter(tmp_path)
    save_file({"nonsense": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    with pytest.raises(ModelError, match="nonsense: no tensor of a bottleneck adapter"):
        load_adapter(tmp_path)


def test_exports_say_what_they_cannot_take_in(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "base")
    engine, (slot,) = make_engine(make_base("llama"), VARIANTS["houlsby"])
    settings = ModelConfig(path=str(tmp_path / "base"), device="cpu", dtype="float64")
    source = replace(source_of(tmp_path / "base", on_disk(engine.bank, slot)), tokenizer=object(), model=settings)
    for target in (MergedExportConfig(), LoraGGUFExportConfig()):
        with pytest.raises(ModelError, match="mine: houlsby /4: it is a network of its own between the layers"):
            target.build().needs(source)
    target = PeftExportConfig().build()
    target.needs(source)
    (tmp_path / "out").mkdir()
    target.write(source, tmp_path / "out", lambda done, total, what="": None)
    assert "adapters.init" in target.usage(source, "out")
    token_L = np.arange(3, 9)
    (reading,) = target.read_back(source, tmp_path / "out")
    with reading.open() as reader:
        exported_LV = reader.logprobs(token_L)
    ours_L = engine.logprobs(slot, [Segment(token_L, np.r_[0, np.ones(5)].astype(np.float32))])[0]
    np.testing.assert_allclose(exported_LV[np.arange(5), token_L[1:]], ours_L[1:], atol=1e-4)


@slow
@pytest.mark.skipif("ADAPTERS_PYTHON" not in os.environ, reason="ADAPTERS_PYTHON names no Python that has `adapters`")
@pytest.mark.parametrize(
    "changes", [{}, {"ln_before": True, "ln_after": True, "scaling": "channel"}], ids=["", "norms"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@every_variant
def test_adapterhub_reads_ours(name: str, family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    bank = Bank(base_of(family))
    slot = bank.add(VARIANTS[name].model_copy(update=changes), seed=3)
    moved(bank, slot)
    folder = FIXTURES / family / "base"
    save_adapter(tmp_path / "a", on_disk(bank, slot), describe_base(bank.base.model, str(folder)))
    script = Path(__file__).parent / "make_with_adapterhub.py"
    out = tmp_path / "theirs.safetensors"
    subprocess.run(
        [os.environ["ADAPTERS_PYTHON"], str(script), "ask", str(folder), str(tmp_path / "a"), str(out)],
        check=True,
        env={**os.environ, "PYTHONPATH": "", "PYTHONWARNINGS": ""},
    )
    with torch.no_grad():
        ours = logits(bank, slot)
    torch.testing.assert_close(ours, load_file(out)["logits"], rtol=1e-5, atol=1e-5)
