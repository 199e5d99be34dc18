"""Every variant against PEFT's own implementation, on whole models: files both ways, and gradients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.base import reads_all_from_files
from lowrank.adapters.variants.pissa import largest_singular
from lowrank.checkpoints.peft_config import describe_base, peft_incompatibility
from lowrank.checkpoints.peft_layout import load_adapter, read_adapter_header, save_adapter
from lowrank.errors import ModelError
from lowrank.models.base import Base
from lowrank.models.loading.quantize_on_load import pack_in_place
from tests.adapters.peft_twins import (
    SHIFTED,
    TOKEN,
    VARIANTS,
    config_of,
    logits,
    moved,
    new_bank,
    on_disk,
    twin_of,
)
from tests.adapters.variant_cases import GainConfig, RoundedConfig
from tests.peft_oracle import plain_loss
from tests.releases import since_peft
from tests.tiny_models import make_base, make_engine, make_model, random_step

ON_DENSE = [name for name in VARIANTS if not VARIANTS[name].needs_quantized]
PEFT_CONFIGS: dict[str, Any] = {
    "dora": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["q_proj", "up_proj"]),
    "vera": peft.VeraConfig(r=6, target_modules=["q_proj", "k_proj", "down_proj"], projection_prng_key=7),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 3}),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=["q_proj", "up_proj"], decompose_both=True),
    "miss": peft.MissConfig(r=5, target_modules=["q_proj", "down_proj"]),
    "hra": peft.HRAConfig(r=6, target_modules=["q_proj", "down_proj"]),
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "up_proj"]),
    "oft exact": peft.OFTConfig(oft_block_size=4, target_modules=["v_proj", "down_proj"], use_cayley_neumann=False),
}

every_variant = pytest.mark.parametrize("name", ON_DENSE)
trained_as_saved = pytest.mark.parametrize(
    "name", [name for name in ON_DENSE if reads_all_from_files(VARIANTS[name]().build())]
)
"""Those whose files hold all that training needs. AdaLoRA's do not: test_adalora.py."""


@pytest.fixture(autouse=True)
def _peft_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            message=".*(is_gradient_checkpointing|fan_in_fan_out|vera_A and vera_B|pattern keys|PiSSA changes).*",
        )
        yield


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@every_variant
def test_ours_to_peft_and_back(name: str, family: str, tmp_path: Path) -> None:
    model = make_model(family)
    bank = new_bank(family)
    slots = [
        bank.add(config, seed=seed) for seed, config in enumerate([config_of("lora", family), config_of(name, family)])
    ]
    for slot in slots:
        moved(bank, slot)
    ours, plain = logits(bank, slots[1]), model(TOKEN).logits
    assert (ours - plain).abs().max() > 1e-3
    base = describe_base(bank.base.model, family)
    adapter = on_disk(bank, slots[1])
    save_adapter(tmp_path / "a", adapter, base, dtype=None)
    if peft_incompatibility(base, adapter.targets, adapter.config.peft) is None:
        with torch.no_grad():
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "a"))(TOKEN).logits
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)
    else:
        assert family == "gpt2"
        assert not adapter.config.peft.on_conv1d
    saved = load_adapter(tmp_path / "a")
    other = new_bank(family)
    slot = other.add(saved.config, seed=9)
    other.load(slot, saved.tensors)
    torch.testing.assert_close(logits(other, slot), ours, rtol=1e-9, atol=1e-9)


@trained_as_saved
def test_resume_restores_every_tensor_to_the_bit(name: str, tmp_path: Path) -> None:
    """From what a checkpoint keeps, also of frozen tensors."""
    bank = new_bank()
    slot = bank.add(config_of(name), seed=3)
    moved(bank, slot)
    save_adapter(tmp_path / "a", on_disk(bank, slot), describe_base(bank.base.model, "llama"), dtype=None)
    again = new_bank()
    again.load(again.add(config_of(name), seed=3), load_adapter(tmp_path / "a").tensors)
    for path, layer in bank.slots[slot].layers.items():
        for key, tensor in layer.masters.items():
            assert torch.equal(tensor, again.slots[0].layers[path].masters[key]), f"{path}.{key}"


@pytest.mark.parametrize("case", PEFT_CONFIGS)
def test_peft_to_ours(case: str, tmp_path: Path) -> None:
    model = make_model("llama")
    twin = peft.get_peft_model(copy.deepcopy(model), PEFT_CONFIGS[case], autocast_adapter_dtype=False).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        theirs = twin(TOKEN).logits
    assert (theirs - model(TOKEN).logits).abs().max() > 1e-3
    twin.save_pretrained(str(tmp_path / "a"))
    saved, header = load_adapter(tmp_path / "a"), read_adapter_header(tmp_path / "a")
    assert saved.config.type == case.split()[0]
    assert (header.config, header.targets, header.base_name) == (saved.config, saved.targets, saved.base_name)
    assert {key: value.shape for key, value in header.tensors.items()} == {
        key: value.shape for key, value in saved.tensors.items()
    }
    assert all(value.is_meta for value in header.tensors.values())
    bank = new_bank()
    slot = bank.add(saved.config, seed=0)
    bank.load(slot, saved.tensors)
    torch.testing.assert_close(logits(bank, slot), theirs, rtol=1e-9, atol=1e-9)


def test_other_projections_than_the_key_gives_are_the_files(tmp_path: Path) -> None:
    twin = peft.get_peft_model(make_model("llama"), PEFT_CONFIGS["vera"], autocast_adapter_dtype=False).eval()
    twin.base_model.vera_A["default"] += 1
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter += 0.1
        theirs = twin(TOKEN).logits
    twin.save_pretrained(str(tmp_path / "a"))
    saved = load_adapter(tmp_path / "a")
    bank = new_bank()
    slot = bank.add(saved.config, seed=0)
    bank.load(slot, saved.tensors)
    torch.testing.assert_close(logits(bank, slot), theirs, rtol=1e-9, atol=1e-9)


@trained_as_saved
def test_gradients_equal_pefts_next_to_other_variants(name: str, tmp_path: Path) -> None:
    """Slot 1 of 3, other variants beside it; three AdamW steps in float64."""
    base = make_base("llama")
    engine, slots = make_engine(base, config_of("dora"), config_of(name), GainConfig(), learning_rate=1e-2)
    for slot in slots[:2]:
        moved(engine.bank, slot, 0.1)
    twin, theirs = twin_of(engine.bank, slots[1], tmp_path / "a")
    ours = engine.bank.parameters(slots[1])
    frozen = engine.bank.slots[slots[1]].variant.frozen
    assert ours.keys() == {key for key in theirs if key.removesuffix(".weight").rpartition(".")[2] not in frozen}
    optimizer = torch.optim.AdamW([theirs[key] for key in ours], lr=1e-2, weight_decay=0.0)
    for step in range(3):
        work = {slot: random_step(10 * step + slot, [5 + slot, 9, 14]) for slot in slots}
        loss = plain_loss(twin, work[slots[1]])
        loss.backward()
        forwarded = engine.forward_backward(work)[slots[1]]
        assert forwarded.loss == pytest.approx(loss.item(), abs=1e-10)
        for key, parameter in ours.items():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, theirs[key].grad, rtol=1e-8, atol=1e-10)
        torch.nn.utils.clip_grad_norm_([theirs[key] for key in ours], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for slot in slots:
            engine.optim_step(slot, 1e-2)
    for key, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[key], rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", SHIFTED)
def test_starts_where_peft_starts(name: str) -> None:
    """The product B0 A0 is PEFT's (singular vectors have no sign of their own)."""
    model = make_model("llama", torch.float32)
    settings = {"niter": 0} if name == "pissa" else {}
    bank = Bank(Base(copy.deepcopy(model), None, "llama"))
    slot = bank.add(VARIANTS[name](rank=4, alpha=6, target_modules=("q_proj", "down_proj"), **settings), seed=0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=name)
    twin = peft.get_peft_model(copy.deepcopy(model), config)
    for path, layer in bank.slots[slot].layers.items():
        theirs = twin.base_model.model.get_submodule(path)
        product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
        ours = layer.masters["start_B"] @ layer.masters["start_A"]
        torch.testing.assert_close(ours, product.detach(), rtol=1e-3, atol=1e-5)


def test_the_fast_svd_is_nearly_the_exact_one() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 200, generator=generator) * torch.linspace(1, 0.2, 200)
    exact = (torch.linalg.svdvals(matrix)[16:] ** 2).sum().sqrt()
    for niter, excess in ((4, 0.01), (16, 0.001)):
        left, values, right = largest_singular(matrix, 16, niter, generator)
        assert exact * (1 - 1e-4) < (matrix - left * values @ right.t()).norm() < exact * (1 + excess)


def test_pissa_is_saved_as_peft_converts_it(tmp_path: Path) -> None:
    """PEFT's own conversion of the same trained adapter: the same file, to rounding."""
    bank = Bank(Base(make_model("llama", torch.float32), None, "llama"))
    config = VARIANTS["pissa"](rank=4, alpha=6, target_modules=("q_proj",))
    slot = bank.add(config, seed=0)
    with torch.no_grad():
        for parameter in bank.parameters(slot).values():
            parameter += 0.1
    save_adapter(tmp_path / "ours", on_disk(bank, slot), describe_base(bank.base.model, "llama"))
    model = make_model("llama", torch.float32)
    twin = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    layers = {path: twin.base_model.model.get_submodule(path) for path in bank.slots[slot].layers}
    for path, layer in layers.items():
        for key in ("lora_A", "lora_B"):
            getattr(layer, key)["default"].weight.data = (
                bank.slots[slot].layers[path].masters[f"start_{key[-1]}"].clone()
            )
    twin.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it: keep the start
    twin.save_pretrained(str(tmp_path / "start"))
    twin.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_A["default"].weight += 0.1
            layer.lora_B["default"].weight += 0.1
    twin.save_pretrained(str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours, theirs = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key])


def test_loftq_makes_up_for_what_quantization_lost(tmp_path: Path) -> None:
    """On a 4-bit base: nearer to the original at the start, the more so the higher the rank; plain LoRA in files."""
    model = make_model("llama", torch.float32)
    model.save_pretrained(str(tmp_path / "model"))
    exact = model(TOKEN).logits
    pack_in_place(model, RoundedConfig())  # type: ignore[arg-type]
    bank = Bank(Base(model, None, str(tmp_path / "model")))
    slots = [
        bank.add(VARIANTS["loftq"](rank=rank, niter=niter), seed=0) for rank, niter in ((4, 16), (16, 0), (16, 16))
    ]
    error = [float((logits(bank, slot) - exact).norm()) for slot in (-1, *slots)]
    assert error[0] > 1.15 * error[1] > 1.5 * error[2]
    assert error[3] == pytest.approx(error[2], rel=0.05)
    assert bank.saved(slots[0]).config.type == "lora"


def test_loftq_says_what_it_needs() -> None:
    with pytest.raises(ModelError, match="makes up for what quantization lost"):
        new_bank().add(VARIANTS["loftq"](), seed=0)
    model = make_model("llama")
    pack_in_place(model, RoundedConfig())  # type: ignore[arg-type]
    bank = Bank(Base(model, None, "/nowhere"))
    with pytest.raises(ModelError, match=r"unquantized checkpoint|no tensor"):
        bank.add(VARIANTS["loftq"](), seed=0)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vera", {"rank_pattern": {"q_proj": 2}}, "rank_pattern: all layers share A and B"),
        ("ia3", {"dropout": 0.1}, "dropout: .*nothing to drop"),
        ("loha", {"dropout": 0.1}, "dropout: "),
        ("lokr", {"decompose_factor": 0}, "-1 or a number above 0"),
        ("hra", {"rank": 3}, "rank 3: an odd number of reflections"),
        ("oft", {"alpha_pattern": {"q_proj": 2.0}}, "OFT has no alpha"),
    ],
)
def test_what_cannot_be_combined_is_said_by_the_settings(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VARIANTS[name](**settings)


def test_layers_that_do_not_fit_are_listed_at_once() -> None:
    bank = new_bank()
    with pytest.raises(ModelError, match=r"does not fit") as caught:
        bank.add(VARIANTS["oft"](block_size=5), seed=0)
    assert str(caught.value).count("does not divide") == 14
    with pytest.raises(ModelError, match="rank 40 is more than"):
        bank.add(VARIANTS["pissa"](rank=40), seed=0)
    assert bank.add(VARIANTS["lora"](), seed=0) == 0


def test_kronecker_factors_are_pefts() -> None:
    from peft.tuners.lokr.layer import factorization

    from lowrank.adapters.variants.lokr import factors

    for width in range(1, 200):
        for factor in (-1, 2, 3, 4, 7, 8, 16):
            assert factors(width, factor) == factorization(width, factor), (width, factor)


def test_loraplus_learns_faster_in_B() -> None:
    engine, (slot,) = make_engine(
        make_base("llama"), VARIANTS["lora"](rank=4, loraplus_lr_ratio=16.0), type="sgd", max_grad_norm=None
    )
    moved(engine.bank, slot)
    engine.forward_backward({slot: random_step(0, [9, 14])})
    before = {key: (value.detach().clone(), value.grad) for key, value in engine.bank.parameters(slot).items()}
    engine.optim_step(slot, 1e-3)
    for key, value in engine.bank.parameters(slot).items():
        start, gradient = before[key]
        assert gradient is not None
        torch.testing.assert_close(value, start - (16e-3 if "lora_B" in key else 1e-3) * gradient)


def test_loraplus_groups_are_pefts() -> None:
    from peft.optimizers import create_loraplus_optimizer

    bank = new_bank()
    config = VARIANTS["dora"](rank=4, loraplus_lr_ratio=16.0)
    slot = bank.add(config, seed=0)
    factors = dict(zip(bank.parameters(slot), bank.learning_rate_factors(slot, 2e-4)))
    twin = peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear"))
    optimizer = create_loraplus_optimizer(twin, torch.optim.AdamW, lr=2e-4, loraplus_lr_ratio=16.0)
    rate_of = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    theirs = {
        key.removeprefix("base_model.model.").replace(".default", "").replace("vector.weight", "vector"): rate_of[
            id(each)
        ]
        for key, each in twin.named_parameters()
        if each.requires_grad
    }
    assert {key: pytest.approx(factor * 2e-4) for key, factor in factors.items()} == theirs


@pytest.mark.parametrize(
    "saved", [pytest.param(True, marks=since_peft("0.21", "it reads the projection that a file holds")), False]
)
def test_vera_with_and_without_its_projection_both_ways(saved: bool, tmp_path: Path) -> None:
    """PEFT's file to us, to our export, back to us and to PEFT; a projection of other random numbers too."""
    config = peft.VeraConfig(r=6, target_modules=["q_proj", "down_proj"], projection_prng_key=7, save_projection=saved)
    twin: Any = peft.get_peft_model(make_model("llama"), config).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        if saved:
            twin.base_model.vera_A["default"].mul_(1.5)
    expected = twin(TOKEN).logits.detach()
    twin.save_pretrained(str(tmp_path / "theirs"))
    folder = tmp_path / "theirs"
    for again in ("once", "twice"):
        adapter = load_adapter(folder)
        bank = new_bank()
        slot = bank.add(adapter.config, seed=0)
        for _ in range(2):
            bank.load(slot, adapter.tensors)
        torch.testing.assert_close(logits(bank, slot), expected, rtol=0, atol=1e-10)
        # `adapter` as `lowrank export --to peft` hands it on, `on_disk` as training saves it
        for kind, written in (("exported", adapter), ("trained", on_disk(bank, slot))):
            save_adapter(tmp_path / f"{kind}-{again}", written, describe_base(bank.base.model, "tiny"), dtype=None)
            back = peft.PeftModel.from_pretrained(make_model("llama"), str(tmp_path / f"{kind}-{again}")).eval()
            torch.testing.assert_close(back(TOKEN).logits, expected, rtol=0, atol=1e-10)
        folder = tmp_path / ("exported-once" if again == "once" else "trained-once")
