"""What objectives on whole answers share: sums over segments, and the two answers of each pair side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from lowrank.batches import Batch, Scores, Totals
from lowrank.objectives import Metrics
from lowrank.segments import CHOSEN, REJECTED


def per_segment(value_T: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Weighted sums over each segment: (T) -> (S), in the dtype of `value_T`."""
    segment_T = torch.arange(len(batch.lengths), device=value_T.device).repeat_interleave(
        batch.start_S1.diff(), dim=0, output_size=batch.num_tokens
    )
    weighted_T = batch.weight_T.to(value_T.dtype) * value_T
    return value_T.new_zeros(len(batch.lengths)).index_add(0, segment_T, weighted_T)


def tokens_per_segment(batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """Sum of the weights of each segment, (S); 1 where there is none, so that it can be divided by."""
    count_S = per_segment(torch.ones_like(batch.weight_T, dtype=dtype), batch)
    return torch.where(count_S == 0, 1.0, count_S)


@dataclass(frozen=True)
class Pairs:
    """Which segments are the chosen and the rejected answer of each pair, (P) each."""

    chosen_P: torch.Tensor
    rejected_P: torch.Tensor

    def of(self, value_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(of the chosen, of the rejected)`."""
        return value_S[self.chosen_P], value_S[self.rejected_P]


def pairs_of(batch: Batch) -> Pairs:
    """The pairs of a batch of one job, by number and role; never by position. `count_pairs` has seen that they are
    whole; here it would have to wait for the device."""
    order_S = (2 * batch.pair_S + (batch.role_S == REJECTED)).argsort()
    return Pairs(order_S[0::2], order_S[1::2])


def verbose_weights(batch: Batch, pairs: Pairs, alpha: float) -> torch.Tensor:
    """LD-DPO's weights (arXiv:2409.06411), (T): 1, but `alpha` for an answer's tokens beyond the length of the pair's
    shorter answer."""
    token_T, weighted_T = torch.arange(batch.num_tokens, device=batch.weight_T.device), batch.weight_T != 0
    segments = len(batch.lengths)
    segment_T = torch.arange(segments, device=token_T.device).repeat_interleave(
        batch.start_S1.diff(), dim=0, output_size=batch.num_tokens
    )
    count_S = token_T.new_zeros(segments).index_add(0, segment_T, weighted_T.long())
    place_T = torch.where(weighted_T, token_T, batch.num_tokens)
    first_S = token_T.new_full((segments,), batch.num_tokens).scatter_reduce(0, segment_T, place_T, "amin")
    public_S = count_S.clone()
    shorter_P = torch.minimum(*pairs.of(count_S))
    public_S[pairs.chosen_P], public_S[pairs.rejected_P] = shorter_P, shorter_P
    public_T = token_T < (first_S + public_S)[segment_T]
    return torch.where(public_T, 1.0, alpha)


def count_pairs(batch: Batch) -> Totals:
    """What objectives on pairs divide by: pairs, weighted tokens of the chosen answers, weighted tokens of all."""
    sides = [batch.pair_S[batch.role_S == role].sort().values for role in (CHOSEN, REJECTED)]
    assert torch.equal(*sides), "a pair was torn apart"
    assert bool(((batch.role_S == CHOSEN) | (batch.role_S == REJECTED)).all()), "segments that are no pairs"
    count_S = per_segment(torch.ones_like(batch.weight_T), batch)
    return {
        "pairs": float((batch.role_S == CHOSEN).sum()),
        "chosen_tokens": float(count_S[batch.role_S == CHOSEN].sum()),
        "tokens": float(count_S.sum()),
    }


def reference_of(scores: Scores, like: torch.Tensor) -> torch.Tensor:
    """`scores.reference_T` in the dtype of `like`; without it there is nothing to compare with."""
    assert scores.reference_T is not None, "the objective needs references, and there are none"
    return scores.reference_T.to(like.dtype)


def chosen_nll(logp_chosen_P: torch.Tensor, totals: Totals) -> torch.Tensor:
    """This batch's share of the chosen answers' mean negative log-probability per token, as in `sft`."""
    return -logp_chosen_P.sum() / max(totals["chosen_tokens"], 1e-9)


def preference_loss(delta_P: torch.Tensor, loss_type: str, beta: float, label_smoothing: float) -> torch.Tensor:
    """The loss of each pair from how much more the chosen answer is preferred, (P) -> (P).

    sigmoid   - log sigmoid(beta delta); with label smoothing e, (1 - e) of it and e of the flipped pair's
    hinge     max(0, 1 - beta delta)
    ipo       (delta - 1 / (2 beta))^2
    """
    if loss_type == "sigmoid":
        right, flipped = F.logsigmoid(beta * delta_P), F.logsigmoid(-beta * delta_P)
        return -(1 - label_smoothing) * right - label_smoothing * flipped
    if loss_type == "hinge":
        return torch.relu(1 - beta * delta_P)
    assert loss_type == "ipo", loss_type
    return (delta_P - 1 / (2 * beta)) ** 2


def pair_metrics(
    rewards: tuple[torch.Tensor, torch.Tensor], logps: tuple[torch.Tensor, torch.Tensor] | None, totals: Totals
) -> Metrics:
    """Means over the pairs of the step, as shares: rewards of both sides, how often and by how much chosen wins."""
    count = max(totals["pairs"], 1.0)
    chosen_P, rejected_P = (reward_P.detach() for reward_P in rewards)
    metrics: Metrics = {
        "rewards/chosen": chosen_P.sum() / count,
        "rewards/rejected": rejected_P.sum() / count,
        "rewards/accuracies": (chosen_P > rejected_P).sum() / count,
        "rewards/margins": (chosen_P - rejected_P).sum() / count,
    }
    if logps is not None:
        metrics["logps/chosen"] = logps[0].detach().sum() / count
        metrics["logps/rejected"] = logps[1].detach().sum() / count
    return metrics
