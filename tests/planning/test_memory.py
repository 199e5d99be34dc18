"""What the plan counts without weights, against the same step with weights."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.models.base import Base
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.checkpointing.memory_efficient_modules import use_memory_efficient_modules
from lowrank.models.config import ModelConfig
from lowrank.models.loading.model_class import model_class
from lowrank.models.loading.quantize_on_load import pack_in_place
from lowrank.models.storages.dense import DenseConfig
from lowrank.models.storages.nf4 import NF4Config
from lowrank.objectives.sft import SFTConfig
from lowrank.planning.capacity import largest_tokens, longest_document
from lowrank.planning.changes import changes_that_fit
from lowrank.planning.choose import choose
from lowrank.planning.fake_copies import fake_copies
from lowrank.planning.live_bytes import LiveBytes
from lowrank.planning.machine import Machine
from lowrank.planning.memory import StepMemory
from lowrank.planning.plan import MARGIN, MemoryPlan, Planner, one_line
from lowrank.planning.simulation import PlannedJob
from lowrank.segments import Segment
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.tiny_models import FAMILIES, random_step

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
LENGTHS = [40, 64, 23, 64]


def planned(*adapters: Any, lengths: list[int] = LENGTHS) -> list[PlannedJob]:
    steps: list[list[Segment]] = [random_step(seed, lengths) for seed in range(len(adapters))]
    return [PlannedJob(adapter, SFTConfig().build(), AdamWConfig(), step) for adapter, step in zip(adapters, steps)]


def folder_of(family: str, tmp_path: Path, dtype: str = "bfloat16", **changes: Any) -> ModelConfig:
    """A checkpoint folder without a single weight."""
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    config.architectures = None
    config.save_pretrained(tmp_path / family)
    return ModelConfig(path=str(tmp_path / family), dtype=dtype, device="cpu")  # type: ignore[arg-type]


def measured(
    settings: ModelConfig, jobs: list[PlannedJob], tokens: int, activation_checkpointing: str | int
) -> tuple[int, int]:
    """(bytes that live between steps without the optimizer, peak above them) of the real step on real tensors."""
    config = transformers.AutoConfig.from_pretrained(settings.path)
    live = LiveBytes()
    with live:
        model = model_class(config).from_config(config, dtype=getattr(torch, settings.dtype))
        model.eval().requires_grad_(False)
        pack_in_place(model, settings.storage)
    use_memory_efficient_modules(model)
    base = Base(model, None, "m")
    base.set_layout("packed")
    with live:
        engine = Engine(base, Bank(base), tokens)
        for seed, job in enumerate(jobs):
            assert job.adapter is not None
            engine.add(engine.bank.add(job.adapter, seed=seed), job.objective, job.optimizer, seed, 0.0)
    set_activation_checkpointing(model, activation_checkpointing)
    before = live.now
    with live, live.phase() as phase:
        engine.forward_backward({slot: job.step for slot, job in enumerate(jobs)})
    return before, phase.bytes - before


@pytest.mark.parametrize(
    ("family", "activation_checkpointing", "dtype"),
    [
        ("llama", "none", "bfloat16"),
        ("llama", "full", "float32"),
        pytest.param("gpt2", "none", "float32", marks=pytest.mark.slow),
        pytest.param("gemma2", "none", "float32", marks=pytest.mark.slow),
        ("qwen3_moe", "none", "bfloat16"),
    ],
)
def test_a_simulated_step_is_a_real_step(
    family: str, activation_checkpointing: str, dtype: str, tmp_path: Path
) -> None:
    """To a few per cent: batches and losses themselves are not counted, and a mixture's routing is not known."""
    settings = folder_of(family, tmp_path, dtype)
    jobs = planned(LoraConfig(rank=4), LoraConfig(rank=8, dropout=0.1))
    static, peak = measured(settings, jobs, 4096, activation_checkpointing)
    step = StepMemory(settings, jobs).step(4096, activation_checkpointing)
    assert step.base + step.adapters == pytest.approx(static, rel=0.03)
    assert step.total - step.static == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    "adapter", [LoraConfig(rank=4), LoraConfig(rank=4, target_parameters=EXPERTS)], ids=["beside", "on them"]
)
def test_packed_experts(adapter: Any, tmp_path: Path) -> None:
    """Their bytes follow from their shapes; one dense matrix at a time; whatever a router would choose."""
    dense = folder_of("qwen3_moe", tmp_path, moe_intermediate_size=128, hidden_size=128, num_experts=8, head_dim=16)
    settings = dense.model_copy(update={"storage": NF4Config()})
    jobs = planned(adapter, adapter)
    static, peak = measured(settings, jobs, 4096, "none")
    step = StepMemory(settings, jobs).step(4096, "none")
    assert step.base + step.adapters == pytest.approx(static, rel=0.03)
    assert step.total - step.static == pytest.approx(peak, rel=0.1)
    assert step.base < 0.6 * StepMemory(dense, jobs).step(4096, "none").base


@pytest.mark.parametrize("storage", [DenseConfig(), NF4Config()], ids=["dense", "nf4"])
def test_a_mixture_in_float32(storage: Any, tmp_path: Path) -> None:
    """torch's fake grouped_mm knows bfloat16 alone."""
    settings = folder_of("mixtral", tmp_path).model_copy(update={"storage": storage})
    jobs = planned(LoraConfig(rank=4), LoraConfig(rank=4, target_parameters=EXPERTS))
    narrow = StepMemory(settings, jobs).step(4096, "none")
    wide = StepMemory(settings.model_copy(update={"dtype": "float32"}), jobs).step(4096, "none")
    assert 1.5 < wide.activations / narrow.activations < 2.5
    assert wide.adapters < narrow.adapters  # no copies in another dtype


@pytest.mark.slow
def test_a_few_layers_stand_for_all(tmp_path: Path) -> None:
    """Counting 8 layers one by one gives about what multiplying gives; mixed kinds of layers too.

    In layers as small as these, what passes in between still shows; of a 0.5 B model both are the same.
    """
    jobs = planned(LoraConfig(rank=4))
    shape = {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 512}
    for family, changes in (("llama", {**shape, "head_dim": 64}), ("deepseek_v3", shape)):
        memory = StepMemory(folder_of(family, tmp_path, **changes), jobs)
        core, seconds = memory.cores()
        assert core is not None
        assert seconds
        multiplied = {policy: memory.step(4096, policy) for policy in ("none", "full")}
        memory.cores = lambda: (None, {})  # type: ignore[method-assign]
        for policy, step in multiplied.items():
            assert memory.step(4096, policy).total == pytest.approx(step.total, rel=0.05), (family, policy)


def test_an_adapter_that_names_layers_is_counted_layer_by_layer(tmp_path: Path) -> None:
    settings = folder_of("llama", tmp_path, num_hidden_layers=8)
    one = StepMemory(settings, planned(LoraConfig(rank=4, target_modules=("layers.7.mlp.down_proj",))))
    assert one.cores() == (None, {})
    assert (
        one.step(4096, "none").adapters
        < StepMemory(settings, planned(LoraConfig(rank=4))).step(4096, "none").adapters / 8
    )


@pytest.mark.slow
def test_parts_move_as_they_must(tmp_path: Path) -> None:
    settings = folder_of("llama", tmp_path, num_hidden_layers=16)
    memory = StepMemory(settings, planned(LoraConfig(rank=4)))
    steps = {policy: memory.step(4096, policy) for policy in ("none", 4, 12, "selective", "full", "sqrt")}
    peaks = [step.total for step in steps.values()]
    assert peaks[0] > peaks[1] > peaks[2] > peaks[4] > peaks[5]
    assert peaks[0] > peaks[3] >= peaks[4]
    assert len({(step.base, step.adapters, step.optimizer) for step in steps.values()}) == 1
    assert memory.step(64, "none").activations < steps["none"].activations / 2
    wide = StepMemory(settings, planned(LoraConfig(rank=8))).step(4096, "none")
    assert wide.adapters == pytest.approx(2 * steps["none"].adapters, rel=0.1)
    assert wide.optimizer == pytest.approx(2 * steps["none"].optimizer, rel=0.1)


def planner_with(memory: StepMemory, room: int) -> Planner:
    """As if the machine had `room` bytes beyond what the process takes by itself."""
    planner = Planner(memory.model, memory)
    smallest = planner.plan(64, "sqrt")
    planner.machine = Machine(int((smallest.process + smallest.step.static + room) / MARGIN), 1 << 40)
    return planner


def test_auto_spends_no_more_than_it_must(tmp_path: Path) -> None:
    memory = StepMemory(folder_of("llama", tmp_path, num_hidden_layers=16), planned(LoraConfig(rank=4)))
    planner = planner_with(memory, 1 << 40)
    free = choose(planner, "auto", "auto")
    assert (free.activation_checkpointing, free.micro_batch_tokens) == ("none", 4096)
    kept = planner.plan(4096, "none")
    seen = []
    for spared in range(1, 10):
        room = int(kept.peak - spared * kept.step.activations / 10)
        planner.machine = Machine(int(room / 0.95), 1 << 40)
        plan = choose(planner, 4096, "auto")
        assert plan.fits or plan.peak == min(planner.plan(4096, each).peak for each in ("none", "full", "sqrt"))
        seen.append(plan.activation_checkpointing)
    numbers = [each for each in seen if isinstance(each, int)]
    assert numbers == sorted(numbers)
    assert numbers
    assert choose(planner, 4096, "none").activation_checkpointing == "none", "what a person chose stays"


def test_changes_are_offered_that_make_it_fit(tmp_path: Path) -> None:
    memory = StepMemory(folder_of("llama", tmp_path, num_hidden_layers=16), planned(LoraConfig(rank=64)))
    planner = Planner(memory.model, memory)
    kept = planner.plan(4096, "none")
    planner.machine = Machine(int((kept.peak - 0.4 * kept.step.activations) / MARGIN), 1 << 40)
    plan = planner.plan(4096, "none")
    assert not plan.fits
    found = changes_that_fit(
        planner, plan, {"activation_checkpointing": "none", "micro_batch_tokens": 4096, "max_length": 64}
    )
    assert any(text.startswith("model.activation_checkpointing: ") for text in found), found


@pytest.mark.slow
def test_float32_is_offered_weights_of_half_the_size(tmp_path: Path) -> None:
    """Only where the run computes in float32, and before what rounds weights."""
    for dtype, first in (("float32", "bf16"), ("bfloat16", "int8")):
        model = folder_of("llama", tmp_path / dtype, hidden_size=256, num_hidden_layers=24, intermediate_size=2048)
        memory = StepMemory(model.model_copy(update={"dtype": dtype}), planned(LoraConfig(rank=4)))
        planner = planner_with(memory, 200 << 20)
        plan = planner.plan(64, "none")
        planner.machine = Machine(int(plan.peak / MARGIN) - (4 << 20), 1 << 40)  # whatever this process holds
        plan = planner.plan(64, "none")
        assert not plan.fits
        settings = {"activation_checkpointing": "auto", "micro_batch_tokens": "auto", "max_length": 64}
        (storage,) = [text for text in changes_that_fit(planner, plan, settings) if text.startswith("model.storage")]
        assert storage.startswith(f"model.storage: {first} would make it fit")
        assert ("a step takes a few percent longer" in storage) == (first == "bf16")


@pytest.mark.slow
def test_reach(tmp_path: Path) -> None:
    memory = StepMemory(folder_of("llama", tmp_path, max_position_embeddings=32768), planned(LoraConfig(rank=4)))
    planner = planner_with(memory, 200 << 20)
    plan = planner.plan(4096, "none")
    tokens, longest = largest_tokens(planner, plan), longest_document(planner, plan)
    assert tokens > 64
    assert 64 < longest <= 32768
    assert planner_with(memory, 400 << 20).machine.host > planner.machine.host
    assert largest_tokens(planner_with(memory, 400 << 20), plan_on(plan, planner, 200 << 20)) > tokens


def plan_on(plan: MemoryPlan, planner: Planner, more: int) -> MemoryPlan:
    return dataclasses.replace(plan, available=planner.machine.host + more)


def test_a_plan_is_plain_json_and_one_line(tmp_path: Path) -> None:
    memory = StepMemory(folder_of("llama", tmp_path), planned(LoraConfig(rank=4)))
    plan = Planner(memory.model, memory).plan(4096, "none")
    content = json.loads(json.dumps(plan.as_dict()))
    assert content["peak"] == max(sum(content["step"].values()) + content["process"], content["loading"])
    assert one_line(plan).startswith("needs about ")


def test_full_tuning_is_planned_too(tmp_path: Path) -> None:
    step = StepMemory(folder_of("llama", tmp_path), planned(None)).step(4096, "none")
    assert step.adapters == pytest.approx(2 * step.base, rel=0.05)
    assert step.optimizer == pytest.approx(4 * step.base, rel=0.05)


def test_a_copy_of_fake_tensors_is_fake_and_leaves_what_it_copies() -> None:
    """torch's own deepcopy reads and writes memory that is not there."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, fake_copies():
        layer = torch.nn.Linear(8, 4)
        layer.register_buffer("seen", torch.ones(3))
        twin = copy.deepcopy(torch.nn.ModuleList([layer, layer]))
        assert isinstance(twin[0].weight, FakeTensor)
        assert isinstance(twin[0].weight, torch.nn.Parameter)
        assert twin[0].weight.fake_mode is mode
        assert twin[0].weight is twin[1].weight is not layer.weight
        assert twin[0].weight.shape == (4, 8)
    assert "__deepcopy__" not in vars(FakeTensor)
