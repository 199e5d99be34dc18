"""DPO with pictures: the loss and the gradients of TRL and PEFT, each document alone in transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.prepare import prepare
from lowrank.objectives.dpo import DPOConfig
from lowrank.records import Preference
from lowrank.segments import CHOSEN, REJECTED, Segment
from lowrank.train.optimizers.adamw import AdamWConfig
from lowrank.train.reference import References
from tests.media_oracle import alone_loss
from tests.peft_oracle import peft_twin
from tests.picture_rows import write_picture_rows
from tests.tiny_models import make_engine, pretend_learned
from tests.tiny_vision_models import make_vision_model
from tests.vision_bases import vision_base

BETA = 0.5


def by_definition(logp_N: torch.Tensor, reference_N: torch.Tensor) -> torch.Tensor:
    """Of the chosen, then the rejected."""
    chosen, rejected = (logp_N - reference_N).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def by_trl(logp_N: torch.Tensor, reference_N: torch.Tensor) -> torch.Tensor:
    """DPOTrainer's own method, given documents of one token that have these log-probabilities."""
    from trl import DPOTrainer

    from tests.objectives.trl_peers import trainer

    made = trainer(
        DPOTrainer, beta=BETA, loss_types=["sigmoid"], loss_weights=[1.0], ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", use_weighting=False, label_smoothing=0.0,
    )  # fmt: skip
    shape = (len(logp_N), 2)
    chosen, rejected = reference_N.chunk(2)
    inputs = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
        "completion_mask": torch.tensor([[0, 1]]).expand(shape),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }

    def model(**_: Any) -> Any:
        rest = torch.zeros(len(logp_N), 1)
        return SimpleNamespace(log_probs=logp_N[:, None], entropy=rest, mean_logits=rest, is_top1=rest.bool())

    return made._compute_loss(model, inputs, False)


@pytest.mark.parametrize("everywhere", [False, True], ids=["language", "all parts"])
@pytest.mark.parametrize(
    "loss_of",
    [by_definition, pytest.param(by_trl, marks=pytest.mark.slow)],  # importing TRL takes most of its ten seconds
)
def test_pairs_are_learned_from_as_trl_and_peft_do(
    loss_of: Callable[..., Any], everywhere: bool, tmp_path: Path
) -> None:
    rows = write_picture_rows(tmp_path)
    base, tokenizer, _ = vision_base(tmp_path / "m", "qwen2_5_vl")
    pictures = [f"pictures/{number}.jpg" for number in range(3)]
    pairs = [
        {"prompt": "<image>Who?", "chosen": "A player.", "rejected": "Nobody at all.", "images": pictures[:1]},
        {"prompt": "<image>And <image>?", "chosen": "Two of them.", "rejected": "None.", "images": pictures[1:]},
        {"prompt": "Without a picture?", "chosen": "Yes.", "rejected": "No.", "images": []},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = DataConfig(
        train=(SourceConfig(path=str(path), media_dir=str(rows.parent)),), shuffle=False, batch_size=3, max_length=2048
    )
    step = prepare(config, tokenizer=tokenizer, record=Preference, seed=0).train.next_step()
    assert [len(each.media.items) if each.media else 0 for each in step] == [1, 1, 2, 2, 0, 0]
    engine, _ = make_engine(base, micro_batch_tokens=700)
    parts: Any = {"freeze_vision_tower": not everywhere, "freeze_multi_modal_projector": not everywhere}
    slot = engine.bank.add(LoraConfig(rank=2, **parts), seed=0)
    engine.add(slot, DPOConfig(beta=BETA).build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
    pretend_learned(engine, slot, seed=1)
    references = References(engine, None)
    references.prepare(step)
    forwarded = engine.forward_backward({slot: references.attach(step)})
    ours = engine.bank.parameters(slot)
    assert any("visual" in name for name in ours) == everywhere
    targets = sorted({name.partition(".lora_")[0] for name in ours})
    twin, theirs = peft_twin(
        make_vision_model("qwen2_5_vl", torch.float64), ours, r=2, lora_alpha=engine.bank.slots[slot].config.alpha or 4,
        target_modules="|".join(targets).replace(".", r"\."),
    )  # fmt: skip

    def logp(segment: Segment) -> torch.Tensor:
        return -alone_loss(twin, base, [segment]) * float(segment.weight_L.sum())

    ordered = [each for role in (CHOSEN, REJECTED) for each in step if each.role == role]
    assert len(ordered) == 6
    with twin.disable_adapter(), torch.no_grad():
        reference_N = torch.stack([logp(each) for each in ordered])
    loss = loss_of(torch.stack([logp(each) for each in ordered]), reference_N)
    loss.backward()
    assert abs(loss.item() - torch.log(torch.tensor(2.0)).item()) > 1e-3, "it has learned something"
    assert forwarded[slot].loss == pytest.approx(loss.item(), abs=1e-6)  # references are float32
    for name, parameter in ours.items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_vl", "paligemma"])
def test_preferences_about_pictures(family: str, tmp_path: Path, rows: Path) -> None:
    """Both answers see the picture of their question: as log-probabilities of each document alone."""
    base, tokenizer, _ = vision_base(tmp_path / "m", family)
    picture = json.loads(rows.read_text())[1]["images"][0]
    pair = {"prompt": "<image>Who?", "chosen": "A player.", "rejected": "Nobody.", "images": [picture]}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pair) + "\n")
    config = DataConfig(train=(SourceConfig(path=str(path), media_dir=str(rows.parent)),), shuffle=False)
    step = prepare(config, tokenizer=tokenizer, record=Preference, seed=0).train.next_step()
    engine, _ = make_engine(base)
    slot = engine.bank.add(LoraConfig(rank=2), seed=0)
    engine.add(slot, DPOConfig().build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
    references = References(engine, None)
    references.prepare(step)
    forwarded = engine.forward_backward({slot: references.attach(step)})
    assert forwarded[slot].loss == pytest.approx(math.log(2), abs=1e-6)  # an adapter that has learned nothing
    with_pictures = engine.logprobs(-1, step)
    alone = [engine.logprobs(-1, [each])[0] for each in step]
    for one, other in zip(with_pictures, alone):
        assert np.abs(one - other).max() < 1e-5
