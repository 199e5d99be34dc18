"""Whole trainings against the peers: a plain PEFT + torch loop, and TRL's SFTTrainer, on the same batches."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, get_scheduler
from trl import SFTConfig, SFTTrainer

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.segments import Segment, number_the_step
from lowrank.train.schedule import ScheduleConfig
from tests.checkpoint_folder import save_checkpoint_folder
from tests.peft_oracle import peft_twin
from tests.tiny_models import make_base, make_engine, make_model

BYTES = {"vocab_size": 259, "initializer_range": 0.1}
PEFT = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
BATCH, PEAK, LONGEST = 6, 5e-3, 48
END, FIRST_BYTE = 2, 3


def as_segment(question: str, answer: str) -> Segment:
    """UTF-8 bytes as tokens; the answer and the end token carry the loss."""
    prompt = [byte + FIRST_BYTE for byte in question.encode()[: LONGEST // 2]]
    completion = [*(byte + FIRST_BYTE for byte in answer.encode()[: LONGEST - len(prompt) - 1]), END]
    weight_L = np.array([0.0] * len(prompt) + [1.0] * len(completion), np.float32)
    return Segment(np.array(prompt + completion), weight_L)


@pytest.fixture(params=["made up", "alpaca_zh_demo.json"])
def samples(request: pytest.FixtureRequest) -> list[Segment]:
    """Rows of a real dataset, and, where that is not at hand, of one made on the spot."""
    if request.param == "made up":
        numbers = np.random.default_rng(0).integers(0, 10**6, (64, 2)).tolist()
        return [as_segment(f"加 {a} and {b}?" * (1 + a % 3), f"是 {a + b}。" * (1 + b % 4)) for a, b in numbers]
    folder: Path = request.getfixturevalue("shared_data")
    rows = json.loads((folder / request.param).read_text(encoding="utf-8"))[:120]
    return [as_segment(row["instruction"] + row["input"], row["output"]) for row in rows]


def step_of(samples: Sequence[Segment], step: int) -> list[Segment]:
    """The batch of an optimizer step, in the order of the rows."""
    return number_the_step([samples[(step * BATCH + index) % len(samples)] for index in range(BATCH)])


def padded(segments: Sequence[Segment]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token_BL, mask_BL, label_BL), right-padded, -100 where nothing is learned."""
    longest = max(map(len, segments))
    token_BL = torch.zeros(len(segments), longest, dtype=torch.int64)
    mask_BL, label_BL = torch.zeros_like(token_BL), torch.full_like(token_BL, -100)
    for row, segment in enumerate(segments):
        token_L = torch.from_numpy(segment.token_L)
        token_BL[row, : len(segment)] = token_L
        mask_BL[row, : len(segment)] = 1
        label_BL[row, : len(segment)] = torch.where(torch.from_numpy(segment.weight_L) > 0, token_L, -100)
    return token_BL, mask_BL, label_BL


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_fifty_steps_of_a_plain_peft_loop(
    family: str, dtype: torch.dtype, tolerance: float, samples: list[Segment]
) -> None:
    """Padded batches, full logits, AdamW with decay, warmup and cosine, clipping: losses, norms and all weights.

    Ours shares the base with another job and is cut in two passes.
    """
    num_steps, limit = 50, 0.55
    base = make_base(family, dtype, **BYTES)
    settings = {"learning_rate": PEAK, "weight_decay": 0.05, "max_grad_norm": limit}
    engine, (slot, other) = make_engine(
        base, LoraConfig(rank=4, alpha=8), LoraConfig(rank=2), micro_batch_tokens=200, **settings
    )
    ours = engine.bank.parameters(slot)
    twin, theirs = peft_twin(make_model(family, dtype, **BYTES), ours, **PEFT)
    optimizer = torch.optim.AdamW(theirs.values(), lr=PEAK, weight_decay=0.05)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=5, num_training_steps=num_steps)
    schedule = ScheduleConfig(type="cosine", warmup_steps=5)
    norms, losses = [], []
    for step in range(num_steps):
        token_BL, mask_BL, label_BL = padded(step_of(samples, step))
        logits_BLV = twin(input_ids=token_BL, attention_mask=mask_BL).logits
        loss = torch.nn.functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), label_BL[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), limit)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        assert PEAK * schedule.factor(step, num_steps) == pytest.approx(rate, abs=1e-15)
        work = {slot: step_of(samples, step), other: step_of(samples, 7 * step + 3)[:2]}
        assert len(engine.micro_batches(work)) > 1
        forwarded = engine.forward_backward(work)[slot]
        updated = {each: engine.optim_step(each, rate) for each in work}[slot]
        assert forwarded.loss == pytest.approx(loss.item(), abs=tolerance), step
        assert updated.grad_norm == pytest.approx(norm.item(), abs=tolerance), step
        norms.append(norm.item())
        losses.append(loss.item())
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=tolerance, msg=name)
    assert min(norms) < limit < max(norms), "some steps are clipped and some are not"
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_loss_per_step_is_trls(samples: list[Segment], tmp_path: Path) -> None:
    """TRL's SFTTrainer with its own collator, loss, clipping, schedule and accumulation, float32 on the CPU."""
    num_steps = 8
    base = make_base("llama", torch.float32, **BYTES)
    engine, (slot,) = make_engine(base, LoraConfig(rank=4, alpha=8), weight_decay=0.0)
    twin, _ = peft_twin(make_model("llama", torch.float32, **BYTES), engine.bank.parameters(slot), **PEFT)
    rows = [segment for step in range(num_steps) for segment in step_of(samples, step)]
    dataset = datasets.Dataset.from_list(
        [
            {
                "input_ids": segment.token_L.tolist(),
                "labels": [int(t) if w else -100 for t, w in zip(segment.token_L, segment.weight_L)],
            }
            for segment in rows
        ]
    )
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=num_steps,
        per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2,
        learning_rate=PEAK,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        max_grad_norm=1.0,
        weight_decay=0.0,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save_checkpoint_folder(tmp_path / "tokenizer"))
    trainer = SFTTrainer(model=twin, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == num_steps

    schedule = ScheduleConfig(type="cosine", warmup_steps=2)
    for step, entry in enumerate(logged):
        forwarded = engine.forward_backward({slot: step_of(samples, step)})[slot]
        updated = engine.optim_step(slot, PEAK * schedule.factor(step, num_steps))
        # TRL averages the losses of its micro-batches weighted by tokens, as we do over the step
        assert forwarded.loss == pytest.approx(entry["loss"], abs=2e-5), step
        assert updated.grad_norm == pytest.approx(entry["grad_norm"], rel=1e-4), step
    assert math.isfinite(forwarded.loss)
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.02
