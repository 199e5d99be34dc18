"""Shifted sparse attention against softmax under an explicit mask, and inside transformers' own models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank.batches import pack
from lowrank.config import validate_settings
from lowrank.errors import ConfigError, ModelError
from lowrank.models.attention.packed import Softmax, attend_explicitly
from lowrank.models.attention.shifted_sparse import ShiftedSparse, groups_of
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load
from lowrank.pipelines.train import train
from lowrank.segments import Segment
from tests.tiny_models import make_base

LENGTHS = (7, 1, 32, 33, 12, 3)
GROUP = 8


def seen(lengths: tuple[int, ...], heads: int) -> torch.Tensor:
    """(H, T, T): which keys a query sees. Straight from the paper: groups of 8 of a document; shifted by 4 in the
    second half of the heads, where nothing is rolled around."""
    document_T = torch.tensor([index for index, length in enumerate(lengths) for _ in range(length)])
    place_T = torch.cat([torch.arange(length) for length in lengths])
    causal = (document_T[:, None] == document_T) & (place_T[:, None] >= place_T)
    straight, shifted = place_T // GROUP, (place_T + GROUP // 2) // GROUP
    halves = [causal & (group_T[:, None] == group_T) for group_T in (straight, shifted)]
    return torch.stack([halves[head >= heads // 2] for head in range(heads)])


def test_groups() -> None:
    assert groups_of(20, 8, 8) == [8, 8, 4]
    assert groups_of(20, 4, 8) == [4, 8, 8]
    assert groups_of(3, 4, 8) == [3]
    assert groups_of(8, 8, 8) == [8]


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 1), (4, 2), (4, 4), (6, 3), (5, 1), (1, 1)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("how", ["plain", "window", "capped", "sinks"])
def test_equals_an_explicit_mask(how: str, dtype: torch.dtype, tolerance: float, heads: int, key_heads: int) -> None:
    """Output and gradients."""
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = [draw(1, count, total, 16).requires_grad_() for count in (heads, key_heads, key_heads)]
    sinks = draw(heads) if how == "sinks" else None
    softmax = Softmax(0.3, 5 if how == "window" else None, 2.0 if how == "capped" else None, sinks)
    mask = seen(LENGTHS, heads)
    if how == "window":
        distance = torch.arange(total)[:, None] - torch.arange(total)
        mask &= distance < 5
    ours = ShiftedSparse(LENGTHS, GROUP, torch.device("cpu")).attend(torch.nn.Identity(), *inputs, softmax)
    wide = [each.detach().double().requires_grad_() for each in inputs]
    theirs = attend_explicitly(wide[0], wide[1], wide[2], softmax, mask[None]).transpose(1, 2)
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    outer = draw(*ours.shape)
    gradients = torch.autograd.grad(ours, inputs, outer)
    for one, other in zip(gradients, torch.autograd.grad(theirs, wide, outer.double())):
        assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_equals_a_model_under_that_mask(family: str) -> None:
    """transformers' own attention, one document at a time, with a mask for each head; whole outside training."""
    base = make_base(family, sliding_window=64) if family == "gemma2" else make_base(family)
    base.shift_attn = GROUP
    lengths = (20, 9, 3)
    generator = np.random.default_rng(0)
    segments = [Segment(generator.integers(3, 97, length), np.ones(length, np.float32)) for length in lengths]
    batch = pack([(-1, segment) for segment in segments])
    with torch.no_grad():
        sparse, whole = base.hidden(batch, training=True), base.hidden(batch)
        expected, expected_whole = [], []
        with base.using_attention("eager"):
            for segment in segments:
                token_1T = torch.from_numpy(segment.token_L)[None]
                mask = seen((len(segment),), base.model.config.num_attention_heads)[None]
                added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e30)
                masks = {"sliding_attention": added, "full_attention": added} if family == "gemma2" else added
                expected.append(base.backbone(token_1T, attention_mask=masks, use_cache=False).last_hidden_state[0])
                expected_whole.append(base.backbone(token_1T, use_cache=False).last_hidden_state[0])
    torch.testing.assert_close(sparse, torch.cat(expected), rtol=1e-5, atol=1e-6)  # its softmax is float32
    torch.testing.assert_close(whole, torch.cat(expected_whole), rtol=1e-5, atol=1e-6)
    assert (sparse - whole)[:4].abs().max() < 1e-9  # the first half of a group sees the same either way
    assert (sparse - whole)[8:20].abs().max() > 1e-3


def test_trains_sparse_and_evaluates_whole(tmp_path: Path) -> None:
    losses = []
    for shift in (None, 16):
        config = {
            "model": {"path": "lowrank/tiny", "dtype": "float32", "shift_attn": shift},
            "data": {
                "train": {"path": "lowrank/demo", "max_samples": 64},
                "eval": {"path": "lowrank/demo-heldout", "max_samples": 8},
            },
            "optimizer": {"learning_rate": 1e-9},
            "max_steps": 1,
            "output_dir": str(tmp_path / str(shift)),
        }
        (job,) = train(validate_settings(config))["jobs"].values()
        losses.append((job["first_loss"], job["last_eval"]["loss"]))
    (whole, held_out), (sparse, held_out_sparse) = losses
    assert held_out_sparse == pytest.approx(held_out, rel=1e-5)
    assert abs(sparse - whole) > 1e-2


def test_refused_where_groups_cannot_be_told() -> None:
    with pytest.raises(ConfigError, match="shift_attn: only where attention is packed"):
        validate_settings(
            {"model": {"path": "m", "attention": "padded", "shift_attn": 8}, "data": "d", "output_dir": "o"}
        )
    with pytest.raises(ConfigError, match=r"objective dpo compares .* leave shift_attn out"):
        validate_settings({"model": {"path": "m", "shift_attn": 8}, "objective": "dpo", "data": "d", "output_dir": "o"})
    with pytest.raises(ConfigError, match="shift_attn: expected a multiple of 2"):
        validate_settings({"model": {"path": "m", "shift_attn": 7}, "data": "d", "output_dir": "o"})


def test_refused_where_the_model_turns_out_padded(tmp_path: Path) -> None:
    base = make_base("jamba", torch.float32)
    base.model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model.shift_attn: groups of tokens"):
        load(ModelConfig(path=str(tmp_path), shift_attn=8, dtype="float32"), tokenizer=object())
