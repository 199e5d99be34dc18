"""Small integers, 1 to 8 bits each, with no bit unused.

In memory a row is kept as planes: 5-bit codes are a plane of their low 4 bits and a plane of their
high bit, so that 5 and 6 bits are as tight as 4 and every plane is unpacked by shifts and masks of
whole bytes. Within a plane of width w the byte i holds codes i, i + n, i + 2n ... (n bytes a row): what
a shift yields is a contiguous piece of the row, which vector units like.

Files of GPTQ, AWQ (other than 4 bits) and compressed-tensors hold a little-endian stream of bits in
32-bit words instead; `from_bit_stream` reads it.
"""

from __future__ import annotations

import torch

MULTIPLE = 8
"""Rows are padded to so many codes, the least that fills whole bytes at every width."""

_WORD = 32


def planes_of(bits: int) -> list[tuple[int, int]]:
    """`[(width, shift)]`: the planes of a code, e.g. 5 bits: `[(4, 0), (1, 4)]`."""
    found, shift = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found.append((width, shift))
            shift += width
    return found


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes."""
    return -(-count // MULTIPLE) * bits


def pack(code_NC: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (N, C), each in [0, 2^bits), as uint8 (N, packed_bytes(C, bits))."""
    assert 1 <= bits <= 8, bits
    count = code_NC.shape[1]
    code_NC = torch.nn.functional.pad(code_NC.to(torch.uint8), (0, -count % MULTIPLE))
    planes = []
    for width, shift in planes_of(bits):
        plane_NC = (code_NC >> shift) & ((1 << width) - 1)
        size = code_NC.shape[1] * width // 8
        plane_NB = plane_NC[:, :size].clone()
        for index in range(1, 8 // width):
            plane_NB |= plane_NC[:, index * size : (index + 1) * size] << (index * width)
        planes.append(plane_NB)
    return torch.cat(planes, dim=1)


def unpack(packed_NB: torch.Tensor, bits: int, out_NC: torch.Tensor) -> torch.Tensor:
    """The codes of `pack`, written into `out_NC` (uint8, contiguous, C the padded width); returns it."""
    first = 0
    for width, shift in planes_of(bits):
        size = out_NC.shape[1] * width // 8
        plane_NB = packed_NB[:, first : first + size]
        first += size
        for index in range(8 // width):
            piece_NC = out_NC[:, index * size : (index + 1) * size]
            low = index * width
            if shift == 0:
                _field(plane_NB, low, width, out=piece_NC)
            else:
                piece_NC |= _field(plane_NB, low, width) << shift
    return out_NC


def _field(plane_NB: torch.Tensor, low: int, width: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Bits [low, low + width) of every byte."""
    if low == 0:
        return torch.bitwise_and(plane_NB, (1 << width) - 1, out=out) if width < 8 else _copy(plane_NB, out)
    field = torch.bitwise_right_shift(plane_NB, low, out=out)
    return field if low + width == 8 else field.bitwise_and_((1 << width) - 1)


def _copy(plane_NB: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    return plane_NB if out is None else out.copy_(plane_NB)


def from_bit_stream(word_NW: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes of each row of a little-endian bit stream in int32 words, as uint8 (N, count).

    32 codes take `bits` words; a code may lie across two of them.
    """
    assert word_NW.dtype == torch.int32
    assert word_NW.shape[1] * _WORD >= count * bits, (word_NW.shape, bits, count)
    rows, words = word_NW.shape
    word_NW = torch.nn.functional.pad(word_NW, (0, -words % bits))
    word_NKW = word_NW.view(rows, -1, bits)
    code_NKC = torch.empty(rows, word_NKW.shape[1], _WORD, dtype=torch.uint8, device=word_NW.device)
    mask = (1 << bits) - 1
    for index in range(_WORD):
        word, low = divmod(index * bits, _WORD)
        code_NK = word_NKW[:, :, word] >> low  # arithmetic: the sign fills from the left, and is masked or replaced
        across = low + bits - _WORD
        if across > 0:
            code_NK = (code_NK & ((1 << (bits - across)) - 1)) | (word_NKW[:, :, word + 1] << (bits - across))
        code_NKC[:, :, index] = (code_NK & mask).to(torch.uint8)
    return code_NKC.view(rows, -1)[:, :count].contiguous()


def to_bit_stream(code_NC: torch.Tensor, bits: int) -> torch.Tensor:
    """What `from_bit_stream` reads: (N, ceil(C * bits / 32)) int32."""
    rows, count = code_NC.shape
    code_NC = torch.nn.functional.pad(code_NC.to(torch.int64), (0, -count % _WORD))
    code_NKC = code_NC.view(rows, -1, _WORD)
    word_NKW = torch.zeros(rows, code_NKC.shape[1], bits + 1, dtype=torch.int64, device=code_NC.device)
    for index in range(_WORD):
        word, low = divmod(index * bits, _WORD)
        wide_NK = code_NKC[:, :, index] << low
        word_NKW[:, :, word] |= wide_NK & 0xFFFFFFFF
        word_NKW[:, :, word + 1] |= wide_NK >> _WORD
    word_NW = word_NKW[:, :, :bits].reshape(rows, -1)[:, : -(-count * bits // _WORD)]
    return (word_NW - ((word_NW >> 31) << 32)).to(torch.int32)  # as two's complement
