"""Devices other than NVIDIA's: found, and given plain torch; Apple's has no float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.errors import ModelError
from lowrank.evaluate.likelihood import continuation_logprobs, label_logprobs
from lowrank.generate.request import GenerationConfig
from lowrank.generate.sampler import Prompt, generate
from lowrank.kernels import accelerators, four_bit, fused, grouped
from lowrank.models.attention import packed
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import choose_device, choose_dtype, load
from lowrank.objectives.sft import SFTConfig
from lowrank.quantization.compensated import Even, quantize_matrix
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.tiny_models import random_step


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Say which accelerators torch finds."""

    def announce(*names: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in names)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: "xpu" in names)
        monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in names)

    return announce


@pytest.mark.parametrize(
    ("names", "expected"),
    [((), "cpu"), (("mps",), "mps"), (("xpu",), "xpu"), (("cuda",), "cuda"), (("cuda", "xpu", "mps"), "cuda")],
)
def test_auto_takes_what_is_there(names: tuple[str, ...], expected: str, there: Any) -> None:
    there(*names)
    assert choose_device(ModelConfig(path="x")).type == expected
    for name in names:
        assert choose_device(ModelConfig(path="x", device=name)).type == name
    for name in {"xpu", "mps", "vulkan"} - {*names}:
        with pytest.raises(ModelError, match=rf"model\.device: '{name}' cannot be used here; say cpu or auto"):
            choose_device(ModelConfig(path="x", device=name))


def test_a_second_xpu_that_is_not_there(there: Any) -> None:
    there("xpu")
    with pytest.raises(ModelError, match="xpu:1 is not there; this machine has 1"):
        choose_device(ModelConfig(path="x", device="xpu:1"))


def test_auto_is_float16_where_bfloat16_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that a T4 supports bfloat16, if it may emulate it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose_dtype(ModelConfig(path="x"), torch.device("cuda")) == torch.float16


@pytest.mark.parametrize("hip", [None, "7.0"])
def test_rocm_is_no_nvidia(hip: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the fast paths are NVIDIA's, its GPUs get plain torch."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "MI300X" if hip else "H100")
    monkeypatch.setattr(fused, "has_triton", lambda: True)
    monkeypatch.setattr(fused, "_is_right", lambda check, device, dtype: True)
    fast = hip is None
    assert packed.has_varlen(gpu) is fast
    assert grouped.has_grouped_kernel(gpu) is fast
    assert four_bit.dequantize_way(gpu, torch.bfloat16) == ("triton" if fast else "torch")
    notice = accelerators.unproven(gpu)
    assert notice is not None
    assert ("MI300X (ROCm)" in notice) is not fast


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 6), False), ((9, 0), True), ((12, 0), False)])
def test_grouped_products_only_where_they_do_not_wait(
    capability: tuple[int, int], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert grouped.has_grouped_kernel(torch.device("cuda")) is fast
    assert packed.has_varlen(torch.device("cuda")) is (capability >= (8, 0))


class NoFloat64(TorchDispatchMode):
    """As Apple's GPUs refuse it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            assert not (isinstance(each, torch.Tensor) and each.dtype == torch.float64), func
        return result


def test_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading with its checks, a step, a drawn answer and an evaluation never ask for it where there is none."""
    monkeypatch.setattr(accelerators, "widest", lambda device: torch.float32)
    settings = ModelConfig(path="lowrank/tiny", device="cpu", dtype="float32", storage={"type": "nf4"})  # type: ignore[arg-type]
    with NoFloat64():
        base = load(settings, notify=lambda text: None)
        engine = Engine(base, Bank(base), 4096)
        slot = engine.bank.add(LoraConfig(rank=4), seed=0)
        engine.add(slot, SFTConfig().build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
        engine.forward_backward({slot: random_step(0, [12, 7], 3072)})
        assert not engine.optim_step(slot, 1e-3).skipped
        sampling = GenerationConfig(max_new_tokens=3, temperature=0.8, top_p=0.9)
        (answer,) = generate(base, engine.bank, [Prompt(np.arange(5, 20), slot)], sampling, stop_tokens=frozenset())
        ((described, counted),) = label_logprobs(base, engine.bank, [(slot, random_step(1, [12], 3072)[0])])
        ((continued, _),) = continuation_logprobs(base, engine.bank, [(slot, [5, 6, 7], [8, 9])])
        _, value_OD = quantize_matrix(torch.randn(4, 32), Even(4), 32, torch.eye(32))
    assert len(answer) == 3
    assert described < 0 < counted
    assert continued < 0
    assert value_OD.isfinite().all()


@pytest.mark.parametrize(("capability", "has"), [("AVX512", True), ("AVX2", False), ("DEFAULT", False)])
def test_a_processor_held_to_avx2_has_no_bf16(monkeypatch: pytest.MonkeyPatch, capability: str, has: bool) -> None:
    """By ATEN_CPU_CAPABILITY: torch emulates it there, dozens of times slower than float32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert accelerators.processor_has_bf16() is has
