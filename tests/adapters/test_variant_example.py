"""The variant of docs/add-a-variant.md as it stands there: one file, a PEFT type of its own, through the one door."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from lowrank import settings
from lowrank.adapters.peft_kind import PeftKind
from lowrank.adapters.variants import AdapterConfig
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import load_adapter, save_adapter
from lowrank.errors import ModelError
from lowrank.third_party import code_allowed
from tests.adapters import test_variants as contract
from tests.adapters.peft_twins import logits, moved, new_bank, on_disk
from tests.tiny_models import make_base, make_engine, random_step

PAGE = Path(__file__).parents[2] / "docs" / "add-a-variant.md"
TYPE = "my_lora_xs:LoraXs"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its settings, read as a job's settings are; afterwards this process does not know it any more."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "my_lora_xs.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_lora_xs", raising=False)
    monkeypatch.setattr(settings, "_LOADED", {})
    with code_allowed():
        return TypeAdapter(AdapterConfig).validate_python(
            {"type": TYPE, "rank": 4, "alpha": 6.0, "rank_pattern": {"v_proj": 2}}
        )


def test_patterns_that_files_have_no_place_for_are_refused(config: Any) -> None:
    """Or it would be trained and written as files that nothing reads."""

    class WithoutPatterns(type(config)):  # type: ignore[misc]
        peft: ClassVar[PeftKind] = replace(config.peft, has_patterns=False)

    class WithoutAlpha(type(config)):  # type: ignore[misc]
        peft: ClassVar[PeftKind] = replace(config.peft, names={"rank": "r"})
        unused: ClassVar[tuple[str, ...]] = ("alpha",)

    for wrong in ({"rank_pattern": {"v_proj": 2}}, {"alpha_pattern": {"v_proj": 2.0}}):
        (name,) = wrong
        with pytest.raises(
            ValueError, match=rf"{name}: PEFT's files for LORAXS have no place .*set adapter\.\w+ for all"
        ):
            WithoutPatterns(**wrong)
    with pytest.raises(ValueError, match="alpha_pattern: PEFT's files for LORAXS"):
        WithoutAlpha(alpha_pattern={"v_proj": 2.0})
    assert WithoutAlpha(rank_pattern={"v_proj": 2}).rank_pattern == {"v_proj": 2}
    assert WithoutPatterns(rank=4, rank_pattern={}).rank == 4


def hold_to_the_contract(*storages: str) -> None:
    """What tests/adapters/test_variants.py asserts of every variant."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(contract.D, contract.O).double().requires_grad_(False)
    for storage in storages:
        base = contract.STORAGES[storage]().wrap(linear)
        contract.test_starts_as_the_base(TYPE, base)
        contract.test_merged_applied_and_routed_are_the_same(TYPE, base)
        contract.test_low_rank_if_it_says_so(TYPE, base)
        contract.test_gradients_are_those_of_apply(TYPE, base, 0.3)
        contract.test_alone_or_one_of_three(TYPE, base)


def starts_elsewhere(variant: Any) -> Any:
    init = variant.init
    return lambda *given: {name: tensor + 0.1 for name, tensor in init(*given).items()}


def starts_nearby(variant: Any) -> Any:
    """Further off than rounding: parts that cancel may differ by that, and nothing else may."""
    init = variant.init
    return lambda *given: {name: tensor + (name == "xs_R") * 1e-9 for name, tensor in init(*given).items()}


def forgets_its_matrix(variant: Any) -> Any:
    return lambda tensors: (tensors["xs_A"], tensors["xs_B"])


def keeps_the_gradient_to_itself(variant: Any) -> Any:
    def as_low_rank(tensors: Any) -> Any:
        return tensors["xs_R"].detach() @ tensors["xs_A"], tensors["xs_B"] + 0 * tensors["xs_R"].sum()

    return as_low_rank


def merges_without_its_scale(variant: Any) -> Any:
    merge = variant.merge
    return lambda weight_OD, scale, tensors: merge(weight_OD, 1.0, tensors)


def test_it_fulfills_the_contract(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contract.VARIANTS, TYPE, type(config))
    hold_to_the_contract("dense", contract.LOSSY)
    variant_class = type(config.build())
    for method, breaks, message in (
        ("init", starts_elsewhere, "test_starts_as_the_base"),
        ("init", starts_nearby, "test_starts_as_the_base"),
        ("as_low_rank", forgets_its_matrix, "test_starts_as_the_base"),
        ("as_low_rank", keeps_the_gradient_to_itself, "test_gradients_are_those_of_apply"),
        ("merge", merges_without_its_scale, "test_merged_applied_and_routed_are_the_same"),
    ):
        broken = breaks(config.build())
        with monkeypatch.context() as patch:
            patch.setattr(variant_class, method, lambda self, *given, broken=broken: broken(*given))
            with pytest.raises(AssertionError) as caught:
                hold_to_the_contract("dense")
        assert message in {entry.name for entry in caught.traceback}, breaks.__name__


def test_it_is_trained_saved_and_read_back(config: Any, tmp_path: Path) -> None:
    engine, (slot,) = make_engine(make_base("llama"), config, learning_rate=0.1)
    work = {slot: random_step(0, [12, 20])}
    losses = []
    for _ in range(6):
        losses.append(engine.forward_backward(work)[slot].loss)
        engine.optim_step(slot, 0.1)
    assert losses[-1] < losses[0] - 0.01
    bank = engine.bank
    folder = tmp_path / "adapter"
    save_adapter(folder, on_disk(bank, slot), describe_base(bank.base.model, "llama"), dtype=None)
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["r"], fields["lora_alpha"]) == ("LORAXS", 4, 6)
    assert fields["rank_pattern"] == {"v_proj": 2}
    assert {name.rpartition(".")[2] for name in load_file(folder / "adapter_model.safetensors")} == {
        "xs_A", "xs_R", "xs_B",
    }  # fmt: skip
    adapter = load_adapter(folder)
    assert adapter.config.type == TYPE
    found = []
    for described, tensors in ((adapter.config, adapter.tensors), (config, bank.saved(slot).tensors)):
        other = new_bank()
        again = other.add(described, seed=9)
        other.load(again, tensors)
        found.append(logits(other, again))
    assert torch.equal(*found)
    assert (found[0] - logits(other, -1)).abs().max() > 1e-3


def test_its_files_are_held_to_what_it_declares(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = new_bank()
    slot = bank.add(config, seed=0)
    moved(bank, slot)
    save_adapter(tmp_path / "a", on_disk(bank, slot), describe_base(bank.base.model, "llama"), dtype=None)
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    first, second = sorted(name for name in tensors if name.endswith("xs_R"))[:2]
    tensors[first] = tensors[first][:1]
    del tensors[second]
    save_file(tensors, path)
    with pytest.raises(ModelError) as caught:
        load_adapter(tmp_path / "a")
    short = [name.removeprefix("base_model.model.") for name in (first, second)]
    assert f"{short[0]}: shape (1, 4), expected (4, 4) by adapter_config.json" in str(caught.value)
    assert f"{short[1]}: missing" in str(caught.value)
    monkeypatch.setattr(settings, "_LOADED", {})
    with pytest.raises(ModelError, match="peft_type is 'LORAXS'; lowrank reads ADALORA, HRA, IA3"):
        load_adapter(tmp_path / "a")
