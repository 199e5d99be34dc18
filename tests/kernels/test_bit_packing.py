"""1 to 8 bits, no bit unused, and every code back as it was."""

from __future__ import annotations

import pytest
import torch

from lowrank.kernels.affine import dequantize
from lowrank.kernels.bit_packing import from_bit_stream, pack, packed_bytes, to_bit_stream, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 8, 31, 77, 128])
def test_codes_come_back(bits: int, count: int) -> None:
    code_NC = torch.randint(0, 1 << bits, (5, count), dtype=torch.uint8)
    packed_NB = pack(code_NC, bits)
    out_NC = torch.full((5, -(-count // 8) * 8), 255, dtype=torch.uint8)
    assert torch.equal(unpack(packed_NB, bits, out_NC)[:, :count], code_NC)
    assert packed_NB.shape == (5, packed_bytes(count, bits))
    assert torch.equal(from_bit_stream(to_bit_stream(code_NC, bits), bits, count), code_NC)


@pytest.mark.parametrize("bits", range(1, 9))
def test_nothing_is_wasted(bits: int) -> None:
    assert pack(torch.zeros(3, 128, dtype=torch.uint8), bits).nbytes * 8 == 3 * 128 * bits
    assert to_bit_stream(torch.zeros(3, 128, dtype=torch.uint8), bits).nbytes * 8 == 3 * 128 * bits


def test_a_bit_stream_is_little_endian_and_crosses_words() -> None:
    code_NC = torch.tensor([[7, 0, 7, 1, 2, 3, 4, 5, 6, 7, 5, 6]], dtype=torch.uint8)
    expected = sum(int(code) << (3 * index) for index, code in enumerate(code_NC[0]))
    words = [int(word) & 0xFFFFFFFF for word in to_bit_stream(code_NC, 3)[0]]
    assert words == [expected & 0xFFFFFFFF, expected >> 32]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "group_size"), [(128, 32), (100, 32), (96, 96), (7, 64)])
def test_dequantize_is_the_formula_rounded_once(dtype: torch.dtype, columns: int, group_size: int) -> None:
    groups = -(-columns // group_size)
    code_OD = torch.randint(0, 16, (300, columns), dtype=torch.uint8)
    scale_OG, zero_OG = torch.rand(300, groups).half() + 0.1, torch.randint(0, 16, (300, groups), dtype=torch.uint8)
    group_D = torch.arange(columns) // group_size
    work = torch.float64 if dtype == torch.float64 else torch.float32
    expected_OD = (code_OD.to(work) - zero_OG.to(work)[:, group_D]) * scale_OG.to(work)[:, group_D]
    packed_OB, out_OD = pack(code_OD, 4), torch.empty(300, columns, dtype=dtype)
    assert torch.equal(dequantize(packed_OB, 4, scale_OG, zero_OG, group_size, out_OD), expected_OD.to(dtype))
    order_D = torch.randperm(columns)
    shuffled = dequantize(pack(code_OD[:, order_D], 4), 4, scale_OG, zero_OG, group_size, out_OD, group_D[order_D])
    assert torch.equal(shuffled, expected_OD[:, order_D].to(dtype))
    one = dequantize(packed_OB, 4, scale_OG, zero_OG[:1, :1], group_size, out_OD).clone()
    assert torch.equal(one, dequantize(packed_OB, 4, scale_OG, zero_OG[:1, :1].expand(300, groups), group_size, out_OD))
