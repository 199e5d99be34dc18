"""Random numbers as a pure function of where they are used.

Dropout and embedding noise must be the same when a layer is recomputed in the backward pass, when a
step is cut into batches otherwise, and whatever other jobs do. A generator with a state cannot give
that; a hash of (key, row counter, column) can. `key_of` mixes what names the place (seed, step,
layer); the row counter is the token's index within its job's optimizer step.
"""

from __future__ import annotations

import math
import zlib

import torch

# Odd multipliers of the `lowbias32` integer hash (C. Wellons, public domain), as signed 32-bit numbers.
_M1 = 0x7FEB352D
_M2 = 0x846CA68B - (1 << 32)
_GOLDEN = 0x9E3779B9 - (1 << 32)


def key_of(*parts: int | str) -> int:
    """A 32-bit key from any integers and strings, the same on every machine and in every process."""
    return zlib.crc32("/".join(map(str, parts)).encode())


def _mix(x: torch.Tensor) -> torch.Tensor:
    """lowbias32 in place on int32; `>>` is arithmetic in torch, so the shifted-in sign bits are masked off."""
    x ^= (x >> 16) & 0xFFFF
    x *= _M1
    x ^= (x >> 15) & 0x1FFFF
    x *= _M2
    x ^= (x >> 16) & 0xFFFF
    return x


def random_bits(counter_T: torch.Tensor, width: int, key: int) -> torch.Tensor:
    """int32 (T, width), uniform over all 2^32 values."""
    signed = key - (1 << 32) if key >= (1 << 31) else key
    row_T = counter_T.to(torch.int32) ^ signed
    column_W = torch.arange(width, dtype=torch.int32, device=counter_T.device) * _GOLDEN + signed
    # Rows and columns are mixed by themselves and their sum once more, whole: with less, some rows draw nearly alike.
    row_T, column_W = _mix(torch.cat((row_T, column_W))).split((len(row_T), width))
    return _mix(row_T[:, None] + column_W)


def dropout(x_TD: torch.Tensor, counter_T: torch.Tensor, key: int, probability: float) -> torch.Tensor:
    """Zero each element with `probability`, scale the rest by 1 / (1 - probability). Linear in `x_TD`."""
    if probability == 0.0:
        return x_TD
    threshold = math.floor(probability * (1 << 32)) - (1 << 31)
    keep_TD = random_bits(counter_T, x_TD.shape[-1], key) >= threshold
    return x_TD * keep_TD * (1.0 / (1.0 - probability))


def uniform(counter_T: torch.Tensor, width: int, key: int) -> torch.Tensor:
    """float32 (T, width), uniform in [-1, 1)."""
    return random_bits(counter_T, width, key).float() / float(1 << 31)
