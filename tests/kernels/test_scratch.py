"""One buffer for each thread, device and dtype."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from lowrank.kernels.scratch import scratch

CPU = torch.device("cpu")


def in_a_new_thread(test: Callable[[], None]) -> Callable[[], None]:
    """Run `test` where no buffer is there yet."""

    def run() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(test).result()

    return run


@in_a_new_thread
def test_the_same_memory_is_handed_out_again_and_grows() -> None:
    large = scratch((64, 64), torch.float32, CPU)
    assert scratch((3, 5), torch.float32, CPU).data_ptr() == large.data_ptr()
    assert scratch((3, 5), torch.bfloat16, CPU).data_ptr() != large.data_ptr()
    assert scratch((65, 64), torch.float32, CPU).shape == (65, 64)


def test_threads_do_not_share() -> None:
    mine, theirs = scratch((8,), torch.float32, CPU), []
    thread = threading.Thread(target=lambda: theirs.append(scratch((8,), torch.float32, CPU)))
    thread.start()
    thread.join()
    assert theirs[0].data_ptr() != mine.data_ptr()


@in_a_new_thread
def test_a_buffer_born_in_inference_mode_can_be_used_in_training() -> None:
    with torch.inference_mode():
        scratch((8,), torch.float32, CPU)
    weight = scratch((8,), torch.float32, CPU).fill_(2.0)
    x = torch.ones(8, requires_grad=True)
    (x * weight).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0] * 8
