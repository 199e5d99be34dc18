"""TRL's own trainers as functions: the real methods that compute a loss, on a batch of ours, without a training run."""

from __future__ import annotations

import inspect
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer
from trl.trainer import grpo_trainer
from trl.trainer.utils import add_fused_lm_head

from lowrank.segments import CHOSEN, MISMATCHED, REJECTED, Segment

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


def dpo(
    model: Any,
    segments: Sequence[Segment],
    loss_types: dict[str, float],
    beta: float,
    ld_alpha: float | None = None,
) -> tuple[torch.Tensor, Any]:
    """`(loss, metrics)` of DPOTrainer with precomputed references."""
    made = trainer(
        DPOTrainer,
        beta=beta,
        loss_types=list(loss_types),
        loss_weights=list(loss_types.values()),
        ld_alpha=ld_alpha,
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
    return made.get_batch_loss_metrics(model, labeled(segments))


def orpo(model: Any, segments: Sequence[Segment], beta: float) -> tuple[torch.Tensor, Any]:
    """`(loss, metrics)` of ORPOTrainer."""
    return trainer(ORPOTrainer, beta=beta).get_batch_loss_metrics(model, labeled(segments))


def reward(model: Any, segments: Sequence[Segment], center: float | None) -> tuple[torch.Tensor, Any]:
    """`(loss, metrics)` of RewardTrainer; `model` is a sequence classifier."""
    made = trainer(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=center))
    chosen, rejected = sides(segments)
    inputs = padded([*chosen, *rejected])
    del inputs["completion_mask"]
    return made.compute_loss(model, inputs), _last(made)


def grpo(model: Any, segments: Sequence[Segment], **settings: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """`(loss, metrics)` of GRPOTrainer on answers with advantages, and references where `beta` is not 0."""
    defaults = {"loss_type": "dapo", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "max_completion_length": 16}
    delta = settings.pop("delta", None)
    made = trainer(
        GRPOTrainer,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        **({"importance_sampling_level": "token"} | defaults | settings),
    )
    add_fused_lm_head(model, outputs=_FUSED)
    prompts, answers = [], []
    for segment in segments:
        at = int(np.flatnonzero(segment.signals_L["advantage"])[0])  # masked answers carry no weight
        prompts.append(segment.token_L[:at])
        answers.append({"ids": segment.token_L[at:], "mask": segment.weight_L[at:], "at": at})
    longest = max(map(len, prompts))
    left = [np.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts]
    seen = [np.pad(np.ones(len(prompt)), (longest - len(prompt), 0)) for prompt in prompts]

    def right(values: Sequence[np.ndarray]) -> torch.Tensor:
        return pad_sequence([torch.from_numpy(np.asarray(value)) for value in values], batch_first=True)

    def signal(name: str) -> torch.Tensor:
        return right([each.signals_L[name][own["at"] :] for each, own in zip(segments, answers)])

    mask = right([own["mask"] for own in answers])
    inputs = {
        "prompt_ids": torch.from_numpy(np.stack(left)).long(),
        "prompt_mask": torch.from_numpy(np.stack(seen)).long(),
        "completion_ids": right([own["ids"] for own in answers]).long(),
        "completion_mask": mask,
        "advantages": signal("advantage")[:, 0],
        "num_items_in_batch": mask.sum(),
    }
    if "logprob" in segments[0].signals_L:
        inputs["old_per_token_logps"] = signal("logprob")
    if made.beta:
        kept = [each.reference_L[own["at"] :] for each, own in zip(segments, answers) if each.reference_L is not None]
        inputs["ref_per_token_logps"] = right(kept)
    return made._compute_loss(model, inputs), _last(made)


def grpo_advantages(reward_NF: torch.Tensor, weight_F: torch.Tensor, group: int, scale: str) -> torch.Tensor:
    """What GRPOTrainer makes of rewards, by the very lines of its source that do."""
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    first, last = "unscorable_mask = torch.isnan(", "advantages = torch.nan_to_num(advantages, nan=0.0)\n"
    lines = textwrap.dedent("        " + source[source.index(first) : source.index(last) + len(last)])
    names = {
        **vars(grpo_trainer),
        "self": SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize", scale_rewards=scale, reward_weights=weight_F
        ),
        "rewards_per_func": reward_NF,
        "num_generations": group,
        "device": reward_NF.device,
    }
    exec(lines, names)  # the peer's own source
    return names["advantages"]


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


def labeled(segments: Sequence[Segment]) -> dict[str, torch.Tensor]:
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
