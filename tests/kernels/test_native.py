"""What a C kernel may be given."""

from __future__ import annotations

import pytest
import torch

from lowrank.kernels.native import pointer


class Wrapped(torch.Tensor):
    """As a sharded tensor: its own address is of no data of its own."""


def test_only_plain_tensors_have_a_pointer() -> None:
    plain = torch.arange(4)
    assert pointer(plain).value == plain.data_ptr()
    assert pointer(torch.nn.Parameter(plain.float())).value
    assert pointer(None).value is None
    for other in (plain.as_subclass(Wrapped), torch.empty(4, device="meta"), torch.eye(3).to_sparse()):
        with pytest.raises(TypeError, match="plain tensors in host memory"):
            pointer(other)
    plain.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="memory has been let go of"):
        pointer(plain)
