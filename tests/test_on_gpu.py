"""What needs a GPU to be true (`make test-gpu`): the GPU path is held to that of processors, which PEFT vouches for.

Kernels that a processor cannot run (variable-length attention, grouped products, Triton) are compared as a whole
here; their calls one by one in tests/models/test_varlen_calls.py, tests/kernels/.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lowrank
import lowrank.models.attention.packed
from lowrank.adapters.bank import Bank
from lowrank.adapters.storage_capabilities import storage_capabilities
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.generate.compiled_decoding import CompiledDecoding
from lowrank.generate.generator import Generator, GeneratorConfig
from lowrank.generate.request import GenerationConfig
from lowrank.generate.sampler import Prompt, generate
from lowrank.kernels import decode_lora, grouped
from lowrank.models.attention.packed import has_varlen
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load
from lowrank.objectives.sft import SFTConfig
from lowrank.segments import Segment
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.tiny_models import random_step

pytestmark = pytest.mark.gpu
GPU = "cuda"
LENGTHS = [40, 7, 130, 64]


def engine_on(device: str, dtype: str, adapters: list[LoraConfig], **model: Any) -> tuple[Engine, list[int]]:
    """One SFT job per adapter on the base that ships with lowrank."""
    settings = ModelConfig(path="lowrank/tiny", device=device, dtype=dtype, **model)  # type: ignore[arg-type]
    base = load(settings, notify=lambda text: None)
    engine, slots = Engine(base, Bank(base), 4096), []
    for seed, adapter in enumerate(adapters):
        slots.append(engine.bank.add(adapter, seed=seed))
        engine.add(slots[-1], SFTConfig().build(), AdamWConfig(), seed=seed, neftune_alpha=0.0)
    return engine, slots


def losses(engine: Engine, slots: list[int], jobs: list[int], steps: int = 4) -> np.ndarray:
    """(steps, jobs): job j's data depend on j and the step alone."""
    found = []
    for step in range(steps):
        work: dict[int, list[Segment]] = {
            slot: random_step(100 * job + step, LENGTHS, 3072) for slot, job in zip(slots, jobs)
        }
        forwarded = engine.forward_backward(work)
        for slot in slots:
            assert not engine.optim_step(slot, 1e-2).skipped
        found.append([forwarded[slot].loss for slot in slots])
    return np.array(found)


@pytest.mark.parametrize(
    ("storage", "dropout"), [("dense", 0.0), ("dense", 0.1), ("nf4", 0.0), ("int8", 0.0), ("hqq", 0.0)]
)
def test_many_jobs_learn_as_on_a_processor(storage: str, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight adapters of different rank: the varlen kernel, each storage's way to decode, and the grouped products, for
    cards that have them and jobs without dropout."""
    calls = {"varlen": 0, "grouped": 0}

    def counted(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(
        lowrank.models.attention.packed, "varlen_attn", counted("varlen", lowrank.models.attention.packed.varlen_attn)
    )
    monkeypatch.setattr(grouped.F, "grouped_mm", counted("grouped", grouped.F.grouped_mm))
    adapters = [LoraConfig(rank=rank, dropout=dropout * (rank == 8)) for rank in (4, 8, 16, 3, 8, 8, 32, 1)]
    given = {"storage": {"type": storage}}
    on_gpu = losses(*engine_on(GPU, "bfloat16", adapters, **given), [*range(8)])
    assert bool(calls["varlen"]) is has_varlen(torch.device(GPU))
    assert bool(calls["grouped"]) is (grouped.has_grouped_kernel(torch.device(GPU)) and not dropout)
    on_cpu = losses(*engine_on("cpu", "float32", adapters, **given), [*range(8)])
    assert on_cpu[-1].mean() < on_cpu[0].mean() - 0.1
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=0.02)


def test_a_job_is_the_same_alone_and_in_company() -> None:
    together = losses(*engine_on(GPU, "bfloat16", [LoraConfig(rank=8)] * 6), [*range(6)])
    alone = losses(*engine_on(GPU, "bfloat16", [LoraConfig(rank=8)]), [0])
    np.testing.assert_allclose(together[:, :1], alone, rtol=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_recompute_policy_has_the_same_gradient(dtype: str) -> None:
    """`offload` too, which exists on a GPU alone."""
    gradients = {}
    for policy in ("none", "selective", "full", "sqrt", "offload"):
        engine, (slot,) = engine_on(GPU, dtype, [LoraConfig(rank=8)])
        set_activation_checkpointing(engine.base.model, policy)
        engine.forward_backward({slot: random_step(0, LENGTHS, 3072)})
        gradients[policy] = torch.cat(
            [
                parameter.grad.flatten()
                for parameter in engine.bank.parameters(slot).values()
                if parameter.grad is not None
            ]
        )
    for policy, gradient in gradients.items():
        difference = (gradient - gradients["none"]).norm() / gradients["none"].norm()
        assert difference < (1e-5 if dtype == "float32" else 0.03), (
            policy
        )  # flash attention's backward adds in any order


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_answers_are_those_of_a_processor(storage: str) -> None:
    """Greedy, float32, pages: the same tokens for the bare base and an adapter in one batch."""
    answers = []
    for device in (GPU, "cpu"):
        given = {"storage": {"type": storage}}
        engine, (slot,) = engine_on(device, "float32", [LoraConfig(rank=8)], **given)
        losses(engine, [slot], [0])
        prompts = [Prompt(np.arange(5 + index, 30 + 9 * index), slot if index % 2 else -1) for index in range(4)]
        sampling = GenerationConfig(max_new_tokens=20, temperature=0.0)
        answers.append(generate(engine.base, engine.bank, prompts, sampling, stop_tokens=frozenset()))
    assert answers[0] == answers[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_answers_through_compiled_layers() -> None:
    """CUDA graphs, bfloat16, several adapters: held to the plain step by itself, and used to the end."""
    engine, slots = engine_on(GPU, "bfloat16", [LoraConfig(rank=8), LoraConfig(rank=4)])
    notes: list[str] = []
    generator = Generator(engine.base, engine.bank, GeneratorConfig(max_num_seqs=4))
    generator.compiled = CompiledDecoding(engine.base, engine.bank, notes.append)
    sampling = GenerationConfig(max_new_tokens=20, temperature=0.0)
    for _ in range(3):  # torch records a graph in the second pass, and replays it from the third on
        prompts = [Prompt(np.arange(5 + index, 30 + 9 * index), (-1, *slots)[index % 3]) for index in range(4)]
        running = [generator.submit(prompt, sampling) for prompt in prompts]
        assert all(len(each.result().tokens) == 20 for each in running)
    assert not notes


def test_steps_ask_the_driver_for_no_memory() -> None:
    """From the third on: all of them have been seen, and whoever asks the driver waits for the card."""
    engine, slots = engine_on(GPU, "bfloat16", [LoraConfig(rank=8)] * 3, storage={"type": "nf4"})
    losses(engine, slots, [*range(3)], steps=2)
    before = torch.cuda.memory_stats()["num_device_alloc"]
    losses(engine, slots, [*range(3)], steps=3)
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


def test_a_run_from_rows_to_a_merged_model(tmp_path: Path) -> None:
    """`lowrank.train` with evaluations and checkpoints, resumed, as on a processor; its answers; its merged weights."""
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(24)
    ]
    curves = []
    for device in (GPU, "cpu"):
        run = lowrank.train(
            model={"path": "lowrank/tiny", "device": device, "dtype": "float32"},
            data={"train": rows, "validation_split": 0.25, "batch_size": 4},
            schedule="constant",
            max_steps=4,
            logging_steps=1,
            eval_steps=2,
            save_steps=2,
            seed=7,
            output_dir=tmp_path / device,
        ).resume(max_steps=6)
        found = run.metrics()
        assert {*found.event} == {"step", "eval"}
        assert found[found.event == "step"].step.tolist() == [1, 2, 3, 4, 5, 6]
        curves.append(found.loss.to_numpy())
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-3)
    run = lowrank.TrainedRun(tmp_path / GPU)
    (job,) = run.jobs
    model = run.load()
    assert model.generate("Say 3.", job, max_new_tokens=6, temperature=0.0)
    assert run.export("merged", tmp_path / "merged", dtype="float32", prompts=rows[:4])["passed"]


def test_triton_serves_the_adapters_of_answers() -> None:
    assert decode_lora.answers_rows(torch.zeros(4, 8, dtype=torch.bfloat16, device=GPU)), "it did not give the same"


def test_every_storage_trains_rightly() -> None:
    """What `lowrank doctor` tries."""
    problems = {each.storage: each.problem for each in storage_capabilities(torch.device(GPU)) if not each.train}
    assert not problems
