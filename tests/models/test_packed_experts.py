"""Fused experts on packed bases: packed one by one while they load, the same arithmetic, the right gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank.adapters.gradient_check import TOLERANCE, gradient_errors
from lowrank.adapters.targets import find_targets, fused_parameters
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.checkpoints.packed_model import quantize_model
from lowrank.errors import ModelError
from lowrank.models import fused_experts
from lowrank.models.base import Base
from lowrank.models.checks.isolation import choose_layout
from lowrank.models.config import ModelConfig
from lowrank.models.fused_experts import OF_ONE_EXPERT, Expert, PackedExperts, counted_rows, projections
from lowrank.models.loading import expert_loading
from lowrank.models.loading.pretrained import load
from lowrank.models.loading.quantize_on_load import kept_dense, pack_in_place
from lowrank.models.storages.packed import PackedLinear
from lowrank.settings import configs_in
from tests.checkpoint_folder import save_checkpoint_folder
from tests.tiny_models import make_engine, make_model, random_step

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "jamba"]
STORAGES = [name for name in configs_in("lowrank.models.storages") if name != "dense"]
BOTH = ("experts.gate_up_proj", "experts.down_proj")
TOKEN = torch.tensor([[5, 9, 11, 3, 8], [7, 7, 4, 60, 90]])


def config_of(folder: Path, storage: Any = "nf4") -> ModelConfig:
    return ModelConfig(path=str(folder), dtype="float32", device="cpu", storage=storage)


def folder_of(path: Path, family: str) -> Path:
    save_checkpoint_folder(path)
    make_model(family, torch.float32).save_pretrained(path)
    return path


def experts_of(model: Any) -> dict[str, PackedExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}


def packed_base(family: str, storage: str, dtype: torch.dtype = torch.float64) -> Base:
    model = make_model(family, dtype)
    pack_in_place(model, configs_in("lowrank.models.storages")[storage]())  # type: ignore[arg-type]
    base = Base(model, None, family)
    choose_layout(base, "auto")
    return base


def unpacked(model: Any, family: str) -> Any:
    """A model of the family with dense weights, those of the packed one."""
    plain = make_model(family, next(model.parameters()).dtype)
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            own: Any = plain.get_submodule(name)
            for projection in projections(module):
                for index, weight in enumerate(getattr(own, projection)):
                    dense_OD = Expert(module, projection, index).dense_weight()
                    weight.copy_(dense_OD.t() if module.is_transposed else dense_OD)
        elif isinstance(module, PackedLinear) and not OF_ONE_EXPERT.search(name):
            plain.get_submodule(name).weight.copy_(module.dense_weight())
    return plain


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_packs_each_expert_as_if_it_had_been_wrapped(family: str, tmp_path: Path) -> None:
    """transformers' loader stacks, joins and transposes; what arrives must be what packing the loaded model gives."""
    folder = folder_of(tmp_path / "model", family)
    described: list[str] = []
    base = load(config_of(folder), notify=described.append)
    plain = load(config_of(folder, "dense"), notify=described.append).model
    assert not any("experts" in sentence for sentence in described)
    found = experts_of(base.model)
    assert found
    assert not kept_dense(base.model).get("fused experts")
    for name, module in found.items():
        fused = plain.get_submodule(name)
        assert module.packed == set(projections(module))
        for projection in projections(module):
            for index, weight in enumerate(getattr(fused, projection)):
                weight_OD = weight.t() if module.is_transposed else weight
                expected: Any = expert_loading.pack_matrix(config_of(folder).storage, weight_OD)
                own = module.matrix(projection, index)
                assert own.state_dict().keys() == expected.state_dict().keys()
                assert all(torch.equal(own.state_dict()[key], value) for key, value in expected.state_dict().items())
        for key, parameter in module.named_parameters(recurse=False):  # gpt-oss has biases
            assert torch.equal(parameter, getattr(fused, key))
    assert {**fused_parameters(base.model)} == {**fused_parameters(plain)}
    assert not any(isinstance(module, PackedExperts) for module in plain.modules())


def test_one_expert_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused parameter never exists: no matrix larger than an expert's reaches a storage, and none is stacked."""
    folder = folder_of(tmp_path / "model", "qwen3_moe")
    stacked: list[int] = []
    monkeypatch.setattr(
        expert_loading.MergeModulelist, "convert", _watched(expert_loading.MergeModulelist.convert, stacked)
    )
    load(config_of(folder))
    assert stacked
    assert max(stacked) == 1


def _watched(convert: Any, sizes: list[int]) -> Any:
    def watch(self: Any, input_dict: Any, *args: Any, **options: Any) -> Any:
        sizes.extend(len(tensors) for tensors in input_dict.values())
        return convert(self, input_dict, *args, **options)

    return watch


@pytest.mark.parametrize(
    ("family", "storage"), [*((each, "nf4") for each in FAMILIES), *(("mixtral", each) for each in STORAGES[:-1])]
)
def test_same_as_the_unpacked_model(family: str, storage: str) -> None:
    """Logits and the loss's gradient, in float64, in one pass with slots that do and do not adapt experts."""
    base = packed_base(family, storage)
    plain = unpacked(base.model, family)
    with base.using_attention(base.own_attention):
        torch.testing.assert_close(base.model(TOKEN).logits, plain(TOKEN).logits, rtol=1e-10, atol=1e-10)
    other = Base(plain, None, family)
    other.set_layout(base.layout)
    configs = [
        LoraConfig(rank=3, target_modules=("o_proj",)),
        LoraConfig(rank=2, target_modules=("o_proj",), target_parameters=BOTH),
        LoraConfig(rank=2, target_modules=(), target_parameters=(BOTH[1],)),
    ]
    gradients = []
    for each in (base, other):
        engine, slots = make_engine(each, *configs)
        work = {slot: random_step(slot, [5 + slot, 9, 14]) for slot in slots}
        for slot in slots:
            for index, parameter in enumerate(engine.bank.parameters(slot).values()):
                generator = torch.Generator().manual_seed(100 * slot + index)
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        engine.evaluate(work)  # where other libraries lose the gradient
        engine.forward_backward(work)
        gradients.append([p.grad for slot in slots for p in engine.bank.parameters(slot).values()])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("storage", STORAGES)
def test_gradient_canary_of_an_expert(storage: str, family: str, dtype: torch.dtype) -> None:
    """With the model's bias and transposition, and another expert in the same scratch between forward and backward."""
    module = next(iter(experts_of(packed_base(family, storage, dtype).model).values()))
    for projection in projections(module):
        layer, other = _Callable(module, projection, 0), _Callable(module, projection, 1)
        errors = gradient_errors(layer, other, dtype, torch.device("cpu"))  # type: ignore[arg-type]
        assert {name: error for name, error in errors.items() if not error < TOLERANCE[dtype]} == {}


class _Callable(Expert):
    """As packed experts call it: inside autograd."""

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        from lowrank.models.storages.packed import frozen_product

        return frozen_product(x_TD, self) if torch.is_grad_enabled() else super().__call__(x_TD)


def test_trains_and_learns() -> None:
    engine, (slot,) = make_engine(
        packed_base("mixtral", "nf4", torch.bfloat16), LoraConfig(rank=4, target_modules=(), target_parameters=BOTH)
    )
    work = {slot: random_step(0, [12, 20])}
    losses = []
    for _ in range(12):
        losses.append(engine.forward_backward(work)[slot].loss)
        assert not engine.optim_step(slot, 2e-2).skipped
    assert losses[-1] < losses[0] - 0.05


def test_experts_can_stay_dense(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", "mixtral")
    described: list[str] = []
    skip = {"type": "nf4", "skip_modules": ["experts"]}
    base = load(config_of(folder, skip), notify=described.append)
    assert not experts_of(base.model)
    assert any("(MixtralExperts) are fused parameters that are not packed" in each for each in described)


def test_what_all_linear_leaves_out_is_told_from_packed_weights() -> None:
    dense, base = make_model("qwen3_moe", torch.float32), packed_base("qwen3_moe", "nf4", torch.float32)
    assert find_targets(base.model, LoraConfig()) == find_targets(dense, LoraConfig())


def test_a_checkpoint_without_an_expert(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", "mixtral")
    tensors = load_file(folder / "model.safetensors")
    name = next(each for each in tensors if ".experts.2.w2." in each)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"experts\.down_proj: shape \(3, 32, 48\) in the checkpoint, \(4, 32, 48\)"):
        load(config_of(folder))


@pytest.mark.parametrize(("family", "storage"), [*((each, "nf4") for each in FAMILIES), ("gpt_oss", "int8")])
def test_quantized_once_and_for_all(family: str, storage: str, tmp_path: Path) -> None:
    """`lowrank quantize`, and training on what it wrote: the same bits as quantizing while loading."""
    folder = folder_of(tmp_path / "model", family)
    quantize_model(config_of(folder, storage), tmp_path / "written", notify=lambda sentence: None)
    again = load(config_of(tmp_path / "written", "dense"), notify=lambda sentence: None).model
    once = load(config_of(folder, storage)).model
    assert experts_of(again).keys() == experts_of(once).keys()
    state = once.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_experts_that_come_quantized_one_by_one(tmp_path: Path) -> None:
    """As tools write a mixture whose experts are linear layers: gate and up projection stay apart, and packed."""
    from lowrank.models.prequantized.bnb import as_config, as_tensors

    folder = folder_of(tmp_path / "model", "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    storage, matrices, dense = configs_in("lowrank.models.storages")["nf4"](), {}, {}
    for name in [each for each in tensors if ".experts." in each]:
        dense[name.removesuffix(".weight")] = tensors[name]
        matrices[name.removesuffix(".weight")] = expert_loading.pack_matrix(storage, tensors.pop(name))  # type: ignore[arg-type]
    for name, matrix in matrices.items():
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in as_tensors(matrix).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    import json

    own = json.loads((folder / "config.json").read_text())
    own["quantization_config"] = as_config(matrices, [], torch.float32)
    (folder / "config.json").write_text(json.dumps(own))
    base = load(config_of(folder, "dense"), notify=lambda sentence: None)
    module = experts_of(base.model)["model.layers.0.mlp.experts"]
    gate, up = (matrices[f"model.layers.0.mlp.experts.1.{each}_proj"] for each in ("gate", "up"))
    expected = torch.cat([gate.dense_weight().clone(), up.dense_weight().clone()])  # type: ignore[operator]
    assert torch.equal(Expert(module, "gate_up_proj", 1).dense_weight(), expected)
    errors = gradient_errors(
        _Callable(module, "gate_up_proj", 1),
        _Callable(module, "down_proj", 1),
        torch.float32,
        torch.device("cpu"),  # type: ignore[arg-type]
    )
    assert max(errors.values()) < TOLERANCE[torch.float32]


class Operators(TorchDispatchMode):
    """Which were called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_row_counts_wait_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layer of a mixture, forward and recomputed: for the counts themselves, not for what bincount wants to
    know of its operand, nor for a copy of the runs that is not pinned."""
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(fused_experts, "to_device", lambda tensor, device: sent.append(tensor) or tensor.to(device))
    with Operators() as operators:
        counts, slots = counted_rows(torch.zeros(7, 2, dtype=torch.int64), torch.arange(14), [(0, 1, 4), (2, 4, 6)], 3)
    assert (counts[0], slots) == ([2, 6, 4, 2], [-1, 0, 2, -1])
    assert not operators.found & {"bincount", "_local_scalar_dense", "nonzero_numpy"}
    assert len(sent) == 1


def test_row_counts_are_those_of_a_loop() -> None:
    torch.manual_seed(0)
    chosen_TK = torch.stack([torch.randperm(5)[:2] for _ in range(9)])
    order_P = torch.sort(chosen_TK.reshape(-1), stable=True).indices
    counts, slots = counted_rows(chosen_TK, order_P, [(3, 2, 5), (1, 5, 7)], 5)
    runs = [(0, 2), (2, 5), (5, 7), (7, 9)]
    assert slots == [-1, 3, 1, -1]
    assert counts == [[int((chosen_TK[a:b] == expert).sum()) for a, b in runs] for expert in range(5)]
