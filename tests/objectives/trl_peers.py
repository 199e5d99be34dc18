"""TRL's own trainers as functions: the real methods that compute a loss, on a batch of ours, without a training run."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.trainer.utils import add_fused_lm_head

from lowrank.records import CHOSEN, MISMATCHED, REJECTED, Segment

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that they may be removed one day
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

_FUSED = ("log_probs", "entropy", "mean_logits", "is_top1")


def trainer(kind: Any, **attributes: Any) -> Any:
    """A trainer of TRL that never saw its constructor, which would want a dataset and an output folder."""
    made = object.__new__(kind)
    common = {
        "accelerator": Accelerator(cpu=True),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "aux_loss_enabled": False,
        "is_encoder_decoder": False,
        "padding_value": 0,
        "pad_token_id": 0,
        "model": SimpleNamespace(training=True),
    }
    for name, value in (common | attributes).items():
        setattr(made, name, value)
    return made


def dpo(model: Any, segments: Sequence[Segment], loss_types: dict[str, float], beta: float) -> tuple[torch.Tensor, Any]:
    """`(loss, metrics)` of DPOTrainer with precomputed references."""
    made = trainer(
        DPOTrainer,
        beta=beta,
        loss_types=list(loss_types),
        loss_weights=list(loss_types.values()),
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        label_smoothing=0.0,
    )
    add_fused_lm_head(model, outputs=_FUSED)
    chosen, rejected = sides(segments)
    inputs = {
        **padded([*chosen, *rejected]),
        "ref_chosen_logps": references(chosen),
        "ref_rejected_logps": references(rejected),
    }
    return made._compute_loss(model, inputs, False), _last(made)


def kto(model: Any, segments: Sequence[Segment], beta: float, weights: tuple[float, float]) -> tuple[torch.Tensor, Any]:
    """`(loss, metrics)` of KTOTrainer with precomputed references."""
    made = trainer(
        KTOTrainer,
        beta=beta,
        loss_type="kto",
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        calculate_KL=True,
        precompute_ref_logps=True,
    )
    add_fused_lm_head(model, outputs=_FUSED)
    rated = [segment for segment in segments if segment.role != MISMATCHED]
    mismatched = [segment for segment in segments if segment.role == MISMATCHED]
    inputs = {
        **padded(rated),
        **{f"KL_{name}": value for name, value in padded(mismatched).items()},
        "label": torch.tensor([segment.role == CHOSEN for segment in rated]),
        "ref_logps": references(rated),
        "ref_KL_logps": references(mismatched),
    }
    return made._compute_loss(model, inputs, False), _last(made)


def cpo(model: Any, segments: Sequence[Segment], **settings: Any) -> tuple[torch.Tensor, Any]:
    """`(loss, metrics)` of CPOTrainer, which does SimPO too."""
    defaults = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "cpo_alpha": 1.0, "simpo_gamma": 0.5}
    made = trainer(CPOTrainer, alpha=0.0, **(defaults | settings))
    return made.get_batch_loss_metrics(model, labelled(segments))


def orpo(model: Any, segments: Sequence[Segment], beta: float) -> tuple[torch.Tensor, Any]:
    """`(loss, metrics)` of ORPOTrainer."""
    return trainer(ORPOTrainer, beta=beta).get_batch_loss_metrics(model, labelled(segments))


def reward(model: Any, segments: Sequence[Segment], center: float | None) -> tuple[torch.Tensor, Any]:
    """`(loss, metrics)` of RewardTrainer; `model` is a sequence classifier."""
    made = trainer(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=center))
    chosen, rejected = sides(segments)
    inputs = padded([*chosen, *rejected])
    del inputs["completion_mask"]
    return made.compute_loss(model, inputs), _last(made)


def sides(segments: Sequence[Segment]) -> tuple[list[Segment], list[Segment]]:
    """`(chosen, rejected)`, in the order of the pairs."""
    ordered = sorted(segments, key=lambda segment: segment.pair)
    chosen, rejected = ([each for each in ordered if each.role == role] for role in (CHOSEN, REJECTED))
    return chosen, rejected


def references(segments: Sequence[Segment]) -> torch.Tensor:
    """(S) sums over each segment."""
    sums = [float(segment.reference_L.sum(dtype=np.float64)) for segment in segments if segment.reference_L is not None]
    assert len(sums) == len(segments)
    return torch.tensor(sums, dtype=torch.float64)


def padded(segments: Sequence[Segment]) -> dict[str, torch.Tensor]:
    """What TRL's collators make of them."""

    def rows(values: Sequence[np.ndarray]) -> torch.Tensor:
        return pad_sequence([torch.from_numpy(value.astype(np.int64)) for value in values], batch_first=True)

    return {
        "input_ids": rows([segment.token_L for segment in segments]),
        "attention_mask": rows([np.ones(len(segment)) for segment in segments]),
        "completion_mask": rows([segment.weight_L != 0 for segment in segments]),
    }


def labelled(segments: Sequence[Segment]) -> dict[str, torch.Tensor]:
    """What the older collators make of pairs."""
    batch = {}
    for name, side in zip(("chosen", "rejected"), sides(segments)):
        rows = padded(side)
        batch[f"{name}_input_ids"] = rows["input_ids"]
        batch[f"{name}_attention_mask"] = rows["attention_mask"]
        batch[f"{name}_labels"] = rows["input_ids"].masked_fill(rows["completion_mask"] == 0, -100)
    return batch


def _last(made: Any) -> dict[str, float]:
    return {name: values[-1] for name, values in made._metrics["train"].items()}
