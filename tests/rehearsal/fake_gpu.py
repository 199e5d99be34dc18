"""Tensors that say cuda:0, and a watch over what makes a processor wait for a GPU.

Fake tensors have a shape, a dtype and a device. An operator on them refuses what its CUDA form refuses as far as torch
has written that down (devices that differ, dtypes, strides of the fused kernels), and gives a fake result. A number
that is read from one (`.item()`, `if tensor:`) does not exist: the watch notes who asked and gives 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import nn
from torch._meta_registrations import meta_conv
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import lowrank
from lowrank.kernels import four_bit, fused

GPU = torch.device("cuda", 0)
ARCHITECTURES = (75, 80, 86, 89, 90)
_LOWRANK = str(Path(lowrank.__file__).parent) + os.sep
_aten = torch.ops.aten


class _Mode(FakeTensorMode):
    """torch asks whether there is a device, and is told so; it must not be looked for all the same."""

    @property
    def avoid_device_init(self) -> bool:
        return True


MODE = _Mode(allow_non_fake_inputs=True)
"""One for all tests: tables and buffers that live as long as the process are made in it."""


def pretend() -> None:
    """Let torch believe in a GPU, and Triton compile where it would launch."""
    torch._C._ensureCUDADeviceGuardSet()
    ctypes.CDLL("libcuda.so.1").set_device_count(64)
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_bf16_supported = lambda *_, **__: True  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *_, **__: (9, 0)  # type: ignore[assignment]
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc]
    fused._is_right = lambda check, device, dtype: True  # type: ignore[assignment]  # numbers cannot be compared
    triton.runtime.JITFunction.run = compile_instead  # type: ignore[method-assign]
    FakeTensor.tolist = _listed  # type: ignore[method-assign]
    for code in four_bit.CODES:
        _tables[code] = four_bit._Tables(code, torch.device("cpu"))
        for name, value in vars(_tables[code]).items():
            if isinstance(value, torch.Tensor) and name != "order":
                setattr(_tables[code], name, fake(value))
    torch.nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    known = four_bit._tables
    four_bit._tables = lambda code, device: known(code, device) if device.type == "cpu" else _tables[code]  # type: ignore[assignment]

    with on_gpu():
        four_bit.dynamic_map(GPU)  # once per process


_tables: dict[str, Any] = {}


def fake(tensor: torch.Tensor) -> torch.Tensor:
    """The same on cuda:0, without memory."""
    with torch.no_grad(), MODE:
        moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def move(model: nn.Module) -> None:
    """Parameters and buffers to the fake GPU, as `model.to(device)` does; whatever else a module holds stays behind."""
    known: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for group in (module._parameters, module._buffers):
            for name, value in group.items():
                if value is not None and not isinstance(value, FakeTensor):
                    group[name] = known.setdefault(id(value), fake(value))  # type: ignore[assignment]
                elif value is not None:
                    group[name] = value


# Attention


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch chooses a kernel by looking at the card. In its place: the flash kernel where it can, else the one that
    older cards, masks and float32 get, which does not know grouped heads (torch would then write the scores out)."""
    if not query.is_cuda:
        return _on_processor(
            query, key, value, attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    half = query.dtype in (torch.float16, torch.bfloat16)
    same = query.shape[-1] == value.shape[-1]
    if half and attn_mask is None and same and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0:
        return _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    assert query.shape[1] == key.shape[1], "grouped heads, which no fused kernel takes here: memory for all scores"
    bias = None
    if attn_mask is not None:
        shape = (*query.shape[:3], key.shape[2])
        bias = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device).expand(shape)
    return _aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


_on_processor = torch.nn.functional.scaled_dot_product_attention

# Triton

_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int32: "i32",
    torch.int64: "i64", torch.int8: "i8", torch.bool: "i1",
}  # fmt: skip
_compiled: set[Any] = set()


def compile_instead(self: Any, *given: Any, grid: Any, warmup: bool = False, **named: Any) -> None:
    """In the place of a launch: are the operands on the GPU, and does the kernel compile for them?"""
    del warmup
    options = {key: named.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion") if key in named}
    values = {**dict(zip(self.arg_names, given)), **named}
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for parameter in self.params:
        value = values.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None:
            types[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            assert value.device.type == "cuda", f"{self.__name__}: {parameter.name} is on {value.device}"
            types[parameter.name] = "*" + _TYPES[value.dtype]
        elif isinstance(value, (bool, int)):
            types[parameter.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
        else:
            assert isinstance(value, float), (parameter.name, value)
            types[parameter.name] = "fp32"
    if callable(grid):
        grid = grid(values)
    assert all(isinstance(size, int) and 0 <= size < 1 << 31 for size in grid), grid
    assert len(grid) < 2 or all(size < 1 << 16 for size in grid[1:]), "the second and third side have 65,535 at most"
    key = (self.__name__, tuple(types.items()), tuple(constants.items()))
    if key not in _compiled:
        with unset_fake_temporarily():
            for architecture in ARCHITECTURES:
                triton.compile(
                    ASTSource(self, types, constants), target=GPUTarget("cuda", architecture, 32), options=options
                )
        _compiled.add(key)


# Waiting


class Waits(TorchDispatchMode):
    """Counts, by the place in lowrank they come from, what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def note(self, what: str) -> None:
        """By the innermost line of ours."""
        frame: Any = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(_LOWRANK):
            frame = frame.f_back
        name = "elsewhere"
        if frame is not None:
            code = frame.f_code
            name = f"{code.co_filename.removeprefix(_LOWRANK)}:{getattr(code, 'co_qualname', code.co_name)}"
        self.found[f"{name} {what}"] += 1

    def _copied(self, tensor: torch.Tensor, target: torch.device, asynchronous: bool) -> None:
        if tensor.device.type == target.type:
            return
        pinned = tensor.is_cuda or getattr(tensor, "is_pinned_here", False)
        if not (asynchronous and pinned):
            self.note(f"{tensor.device.type} to {target.type}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:
            (tensor,) = args
            if tensor.is_cuda:
                self.note("reads a number")
            return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1
        if func in (_aten.nonzero.default, _aten.equal.default):
            if args[0].is_cuda:
                self.note(func.overloadpacket.__name__)
            if func is _aten.equal.default:
                return True
            return torch.zeros(args[0].numel(), args[0].dim(), dtype=torch.int64, device=args[0].device)
        if func is _aten.empty.memory_format and kwargs.pop("pin_memory", False):
            room = func(*args, **kwargs)
            room.is_pinned_here = True
            return room
        if func is _aten.convolution.default and args[0].is_cuda:  # whose fake form asks the card for a kernel
            assert all_on_gpu(args)
            return meta_conv(*args, **kwargs)
        if func is _aten.convolution_backward.default and args[0].is_cuda:
            assert all_on_gpu(args)
            return (*(torch.empty_like(each) if want else None for each, want in zip(args[1:3], args[-1])), None)
        if func is _aten._fused_sgd_.default:  # torch has no fake form of it
            assert all_on_gpu(args, kwargs)
            return None
        if func is _aten._pin_memory.default:
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        if func is _aten._to_copy.default and kwargs.get("device") is not None:
            self._copied(args[0], torch.device(kwargs["device"]), kwargs.get("non_blocking", False))
        if func is _aten.copy_.default:
            self._copied(args[1], args[0].device, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if func in (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default):
            for each in args[1]:
                if each is not None and each.dtype in (torch.bool, torch.uint8) and each.is_cuda:
                    self.note("indexes with booleans")
            if any(each is not None and each.dtype == torch.bool for each in args[1]):  # as if all were true
                chosen = [
                    torch.zeros(each.numel(), dtype=torch.int64, device=each.device)
                    if each is not None and each.dtype == torch.bool and each.dim() == 1
                    else each
                    for each in args[1]
                ]
                args = (args[0], chosen, *args[2:])
        return func(*args, **kwargs)


def _listed(self: FakeTensor) -> Any:
    """In the place of `FakeTensor.tolist`: one wait for all the numbers."""
    waits = next((mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Waits)), None)
    if self.is_cuda and waits is not None:
        waits.note("reads a list")
    one: Any = 1.0 if self.is_floating_point() else 1
    for size in reversed(self.shape):
        one = [one] * size
    return one


@contextlib.contextmanager
def on_gpu() -> Iterator[Waits]:
    """Inside, tensors are made without memory; what is waited for is in the result."""
    waits = Waits()
    with MODE, waits:
        yield waits


def all_on_gpu(*trees: Any) -> bool:
    """Whether every tensor in there is."""
    return all(each.is_cuda for each in tree_leaves(trees) if isinstance(each, torch.Tensor))
