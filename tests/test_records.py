"""Packing segments into a stream: every place, weight and boundary where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank.batches import Batch, pack
from lowrank.segments import CHOSEN, PLAIN, REJECTED, Segment, number_the_step


def segment(*tokens: int, weights: list[float] | None = None, **options: int) -> Segment:
    weight_L = np.array(weights if weights is not None else [0.0] + [1.0] * (len(tokens) - 1), np.float32)
    return Segment(np.array(tokens), weight_L, **options)


@pytest.fixture
def batch() -> Batch:
    """Slots 2, 0 and the bare base, given out of order."""
    return pack(
        [
            (2, segment(10, 11, 12, pair=0, role=CHOSEN, origin=7)),
            (0, segment(20, 21, weights=[0.0, 0.5])),
            (-1, segment(30)),
            (2, segment(40, 41, 42, 43, pair=0, role=REJECTED, weights=[0.0, 0.0, 2.0, 0.0])),
        ]
    )


def test_the_stream(batch: Batch) -> None:
    assert batch.token_T.tolist() == [30, 20, 21, 10, 11, 12, 40, 41, 42, 43]
    assert batch.position_T.tolist() == [0, 0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert batch.start_S1.tolist() == [0, 1, 3, 6, 10]
    assert batch.slot_S.tolist() == [-1, 0, 2, 2]
    assert (batch.lengths, batch.slots, batch.num_tokens) == ((1, 2, 3, 4), (-1, 0, 2, 2), 10)
    assert batch.pair_S.tolist() == [-1, -1, 0, 0]
    assert batch.role_S.tolist() == [PLAIN, PLAIN, CHOSEN, REJECTED]
    assert batch.origin_S.tolist() == [0, 0, 7, 0]
    assert [batch.token_T.dtype, batch.weight_T.dtype, batch.start_S1.dtype] == [
        torch.int64, torch.float32, torch.int32
    ]  # fmt: skip


def test_targets_never_cross_a_boundary(batch: Batch) -> None:
    """The weight of a token is that of the prediction made one place before; the last place predicts nothing."""
    assert batch.target_T.tolist() == [0, 21, 0, 11, 12, 0, 41, 42, 43, 0]
    assert batch.weight_T.tolist() == [0.0, 0.5, 0.0, 1.0, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0]


def test_a_weight_on_a_first_token_does_not_leak_into_the_document_before() -> None:
    """It cannot be predicted from anything; `Segment` says it is 0, and if it is not, nothing happens."""
    batch = pack([(0, segment(1, 2)), (0, segment(3, 4, weights=[1.0, 1.0]))])
    assert batch.weight_T.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert batch.target_T.tolist() == [2, 0, 4, 0]


def test_ranges_of_slots(batch: Batch) -> None:
    assert batch.slot_ranges() == [(-1, 0, 1), (0, 1, 3), (2, 3, 10)]


def test_one_slot_as_a_batch_of_its_own(batch: Batch) -> None:
    own = batch.of_slot(2)
    alone = pack(
        [
            (2, segment(10, 11, 12, pair=0, role=CHOSEN, origin=7)),
            (2, segment(40, 41, 42, 43, pair=0, role=REJECTED, weights=[0.0, 0.0, 2.0, 0.0])),
        ]
    )
    for name, value in vars(alone).items():
        other = getattr(own, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value, name
    assert own.token_T.data_ptr() == batch.token_T[3:].data_ptr()
    assert own.start_S1.dtype == torch.int32
    with pytest.raises(AssertionError, match="slot 1"):
        batch.of_slot(1)


def test_slots_keep_their_order_within() -> None:
    batch = pack([(1, segment(1)), (0, segment(2)), (1, segment(3)), (0, segment(4))])
    assert batch.token_T.tolist() == [2, 4, 1, 3]


def test_origins_count_tokens_of_the_step() -> None:
    numbered = number_the_step([segment(1, 2, 3), segment(4), segment(5, 6)])
    assert [each.origin for each in numbered] == [0, 3, 4]
    again = number_the_step(numbered)
    assert [each.origin for each in again] == [0, 3, 4]


def test_moving_keeps_everything(batch: Batch) -> None:
    moved = batch.to(torch.device("cpu"))
    for name, value in vars(batch).items():
        other = getattr(moved, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value, name


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_tokens_of_any_integer_type(dtype: type) -> None:
    stored = Segment(np.array([1, 60_000, 3], dtype=dtype), np.array([0, 1, 1], dtype=np.float64))
    batch = pack([(0, stored)])
    assert batch.token_T.tolist() == [1, 60_000, 3]
    assert batch.weight_T.dtype == torch.float32
