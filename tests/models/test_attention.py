"""Attention over a packed stream against transformers' own eager attention, one document at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lowrank.batches import pack
from lowrank.models.attention import packed
from lowrank.models.attention.packed import BoundariesMissing, Packed, packed_attention
from lowrank.models.base import Base
from tests.tiny_models import make_base, make_model, random_step

LENGTHS = (7, 1, 32, 33, 12, 7, 64)


class Layer(nn.Module):
    """What transformers' attention functions ask of a layer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True
        self.config = LlamaConfig()
        self.eval()


def operands(dtype: torch.dtype, heads: int = 4, key_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    return [
        torch.randn(1, count, total, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (heads, key_heads, key_heads)
    ]


def boundaries(lengths: tuple[int, ...] = LENGTHS, prompts: tuple[int, ...] = ()) -> Packed:
    return Packed(torch.tensor([0, *lengths]).cumsum(0).int(), lengths, prompts)


def one_by_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, prompts: tuple[int, ...] = ()
) -> torch.Tensor:
    """transformers' own function on each document alone, with an explicit mask where there is a window."""
    outputs = []
    documents = zip(*(tensor.split(LENGTHS, dim=2) for tensor in (q, k, v)))
    for own, prompt in zip(documents, prompts or (0,) * len(LENGTHS)):
        length = own[0].shape[2]
        place = torch.arange(length)
        distance = place[:, None] - place[None, :]
        seen = (distance >= 0) & (distance < (window or length))
        seen[:prompt, :prompt] = True
        outputs.append(sdpa_attention_forward(Layer(q.shape[1] // k.shape[1]), *own, seen[None, None], scaling=0.3)[0])
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 5, 32, 1000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_each_document_as_if_alone(dtype: torch.dtype, tolerance: float, window: int | None, key_heads: int) -> None:
    """Output and gradients, documents of every kind of length."""
    inputs = operands(dtype, key_heads=key_heads)
    ours, nothing = packed_attention(
        Layer(4 // key_heads), *inputs, None, scaling=0.3, sliding_window=window, packed=boundaries()
    )
    theirs = one_by_one(*inputs, window)
    assert nothing is None
    assert ours.shape == (1, sum(LENGTHS), 4, 16)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    outer = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for one, other in zip(torch.autograd.grad(ours, inputs, outer), torch.autograd.grad(theirs, inputs, outer)):
        size = max(other.double().norm().item(), 0.3 * outer.double().norm().item())  # a window of 1: nothing to learn
        assert (one - other).double().norm().item() <= tolerance * size


PROMPTS = (3, 1, 32, 20, 0, 6, 9)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_prompts_are_read_both_ways_and_answers_causally(
    dtype: torch.dtype, tolerance: float, window: int | None
) -> None:
    """A window is one of answers alone, as in transformers' masks of PaliGemma 2."""
    inputs = operands(dtype)
    ours, _ = packed_attention(
        Layer(2), *inputs, None, scaling=0.3, sliding_window=window, packed=boundaries(prompts=PROMPTS)
    )
    theirs = one_by_one(*inputs, window, PROMPTS)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    outer = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for one, other in zip(torch.autograd.grad(ours, inputs, outer), torch.autograd.grad(theirs, inputs, outer)):
        assert (one - other).double().norm().item() <= tolerance * other.double().norm().item()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_and_sinks_written_out(softcap: float | None, sinks: bool, window: int | None) -> None:
    """Gemma 2's cap and gpt-oss's sinks, by the definition."""
    inputs = operands(torch.float64)
    sink_H = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64) if sinks else None
    ours, _ = packed_attention(
        Layer(2), *inputs, None, scaling=0.3, softcap=softcap, s_aux=sink_H, sliding_window=window, packed=boundaries()
    )
    expected = []
    for q, k, v in zip(*(tensor[0].split(LENGTHS, dim=1) for tensor in inputs)):
        for token in range(q.shape[1]):
            first = max(0, token + 1 - window) if window else 0
            score = torch.stack([k[head // 2, first : token + 1] @ q[head, token] * 0.3 for head in range(4)])
            if softcap:
                score = softcap * torch.tanh(score / softcap)
            weight = score.exp()
            total = weight.sum(1) + (sink_H.exp() if sink_H is not None else 0.0)
            seen = [v[head // 2, first : token + 1] for head in range(4)]
            expected.append(torch.stack([weight[head] @ seen[head] / total[head] for head in range(4)]))
    torch.testing.assert_close(ours[0], torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_document_never_moves_another_not_even_with_nan(dtype: torch.dtype, softcap: float | None) -> None:
    """Bit by bit, forward and backward."""
    outcomes = []
    for value in (0.0, float("nan")):
        inputs = operands(dtype)
        with torch.no_grad():
            for tensor in inputs:
                tensor[:, :, 8:40] = value  # the third document
        output, _ = packed_attention(Layer(2), *inputs, None, softcap=softcap, packed=boundaries())
        gradients = torch.autograd.grad(output.float().square().sum(), inputs)
        outcomes.append([output[0], *(gradient[0].transpose(0, 1) for gradient in gradients)])
    for clean, broken in zip(*outcomes):
        assert torch.equal(clean[:8], broken[:8])
        assert torch.equal(clean[40:], broken[40:])
        assert broken[8:40].isnan().any()


def test_without_boundaries_it_refuses() -> None:
    with pytest.raises(BoundariesMissing, match="Layer got no document boundaries"):
        packed_attention(Layer(2), *operands(torch.float32), None)


def test_registering_twice_is_once() -> None:
    packed.register()
    packed.register()
    assert make_base("llama").layout == "packed"


def test_using_another_attention_for_a_while() -> None:
    """Also when something goes wrong meanwhile."""
    base = make_base("llama")

    def fail() -> None:
        with base.using_attention("eager"):
            assert base.model.config._attn_implementation == "eager"
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert base.model.config._attn_implementation == packed.NAME


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_rows_say_where_tokens_are(layout: str) -> None:
    """The draw counter and length of every row a linear layer sees, and whose it is; the same in both layouts."""
    base = Base(make_model("llama"), None, "llama")
    base.set_layout(layout)
    batch = pack([(0, s) for s in random_step(0, [3, 5])] + [(2, s) for s in random_step(1, [2])])
    rows = base.rows(batch)
    if layout == "packed":
        assert rows.num_rows == 10
        assert rows.ranges == ((0, 0, 8), (2, 8, 10))
        assert rows.counter_N.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
        assert rows.length_N.tolist() == [3, 3, 3, 5, 5, 5, 5, 5, 2, 2]
    else:
        assert rows.num_rows == 15
        assert rows.ranges == ((0, 0, 10), (2, 10, 15))
        counter_SL, length_SL = rows.counter_N.view(3, 5), rows.length_N.view(3, 5)
        assert counter_SL[0, :3].tolist() == [0, 1, 2]
        assert counter_SL[1].tolist() == [3, 4, 5, 6, 7]
        assert counter_SL[2, :2].tolist() == [0, 1]
        assert length_SL[:, 0].tolist() == [3, 5, 2]


def test_cost_of_padding() -> None:
    base = Base(make_model("llama"), None, "llama")
    base.set_layout("packed")
    assert base.padded_tokens((3, 9, 4)) == 16
    base.set_layout("padded")
    assert base.padded_tokens((3, 9, 4)) == 27
    assert base.padded_tokens(()) == 0
