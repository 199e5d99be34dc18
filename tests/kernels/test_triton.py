"""The Triton kernels without a GPU: Triton's own compiler builds each for every generation of cards, and its
interpreter computes with each what the plain function beside it computes."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.version import Version

import lowrank.kernels

triton = pytest.importorskip("triton")

CARDS = {75: "T4, RTX 20", 80: "A100", 86: "RTX 30, A10", 89: "RTX 40, L4", 90: "H100, H200"}
ENDS = (75, 90)
"""The oldest and the newest, for which the default suite builds; `make test-slow` builds for all."""
SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}
"""KiB that one block may have (CUDA C++ programming guide, table of compute capabilities): more compiles, and then does
not start."""
OPTIONS = {"enable_fp_fusion": False}
"""As our kernels are launched: each operation rounds by itself, as torch's do."""
FLOATS = ("fp32", "bf16", "fp16")
HALVES = FLOATS[1:]
ROOT = Path(__file__).parents[2]

Build = tuple[dict[str, str], dict[str, Any]]
"""(types of the arguments that are no constants, the constants)."""
BUILDS: dict[str, list[Build]] = {
    "four_bit_triton._dequantize": [
        (
            {
                "packed": "*u8",
                "absmax": "*fp32",
                "values": "*fp32",
                "out": f"*{out}",
                "num_weights": count,
                "block_size": "i32",
            },
            {"BYTES": 1024},
        )
        for out in FLOATS
        for count in ("i32", "i64")
    ],
    "four_bit_triton._product": [
        (
            {
                **dict.fromkeys(("x", "out"), f"*{half}"),
                "packed": "*u8",
                **dict.fromkeys(("absmax", "values"), "*fp32"),
                **dict.fromkeys(("rows", "width", "height", "block_size"), "i32"),
            },
            {"ROWS": 16, "OUT": 64, "BYTES": 32},
        )
        for half in HALVES
    ],
    "decode_lora_triton._shrink": [
        (
            {
                **dict.fromkeys(("x", "A"), f"*{half}"),
                "scale": "*fp32",
                "group": "*i64",
                "h": "*fp32",
                **dict.fromkeys(("rows", "width", "rank", "part_width"), "i32"),
            },
            {"RANK": rank, "BLOCK": 4096 // rank},
        )
        for half in HALVES
        for rank in (1, 16, 256)
    ],
    "decode_lora_triton._expand": [
        (
            {
                **dict.fromkeys(("B", "y"), f"*{half}"),
                "h": "*fp32",
                "group": "*i64",
                **dict.fromkeys(("rows", "height", "rank", "parts"), "i32"),
            },
            {"RANK": rank, "BLOCK": 4096 // rank},
        )
        for half in HALVES
        for rank in (1, 16, 256)
    ],
    "rms_norm_triton._forward": [
        (
            {**dict.fromkeys(("x", "weight", "y"), f"*{half}"), "inverse": "*fp32", "width": "i32", "eps": "fp32"},
            {"KIND": kind, "BLOCK": block, "num_warps": block // 512},
        )
        for half in HALVES
        for kind, block in ((0, 4096), (1, 1024), (2, 8192))
    ],
    "rms_norm_triton._backward": [
        (
            {**dict.fromkeys(("x", "weight", "dy", "dx"), f"*{half}"), "inverse": "*fp32", "width": "i32"},
            {"KIND": kind, "BLOCK": block, "num_warps": block // 512},
        )
        for half in HALVES
        for kind, block in ((0, 4096), (2, 8192))
    ],
    "gated_triton._forward": [
        ({**dict.fromkeys(("gate", "up", "out"), f"*{half}"), "number": "i64"}, {"KIND": kind, "BLOCK": 1024})
        for half in HALVES
        for kind in range(3)
    ],
    "gated_triton._backward": [
        (
            {**dict.fromkeys(("gate", "up", "dy", "dgate", "dup"), f"*{half}"), "number": "i32"},
            {"KIND": kind, "BLOCK": 1024},
        )
        for half in HALVES
        for kind in range(3)
    ],
    "logprobs_triton._score": [
        (
            {
                "raw": f"*{half}",
                "target": "*i64",
                "logprob": "*fp32",
                "width": "i32",
                "multiplier": "fp32",
                "softcap": "fp32",
            },
            {"CAPPED": capped, "GRADIENT": gradient, "BLOCK": 4096},
        )
        for half in HALVES
        for capped, gradient in ((False, True), (True, True), (False, False))
    ],
}
"""Every kernel, with the types it is called with."""


def kernels() -> dict[str, Any]:
    """All of them, found by looking."""
    found = {}
    for module in pkgutil.iter_modules(lowrank.kernels.__path__):
        if module.name.endswith("_triton"):
            for name, thing in vars(importlib.import_module(f"lowrank.kernels.{module.name}")).items():
                if isinstance(thing, triton.runtime.JITFunction) and thing.__module__.endswith(module.name):
                    found[f"{module.name}.{name}"] = thing
    return found


def inlined(kernel: Any) -> bool:
    """A function that other kernels call: it is built with them."""
    return kernel.__name__.endswith("_inline")


def test_every_kernel_is_built_here() -> None:
    assert {name for name, kernel in kernels().items() if not inlined(kernel)} == set(BUILDS)


def dtypes_of(build: Build) -> frozenset[str]:
    """Which floats it computes in."""
    return frozenset(each.removeprefix("*") for each in build[0].values()) & set(HALVES) or frozenset({"fp32"})


def some_of(builds: list[Build], capability: int) -> list[Build]:
    """In the dtype that `auto` takes on that card, and in float32 where there is such a form; of many forms another for
    each card."""
    chosen = []
    for dtype in ("fp16" if capability < 80 else "bf16", "fp32"):
        forms = [each for each in builds if dtypes_of(each) == {dtype}]
        chosen += forms[list(CARDS).index(capability) % max(1, len(forms)) :][:1]
    assert chosen
    return chosen


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "every-form"])
@pytest.mark.parametrize(
    "capability",
    [pytest.param(each, marks=() if each in ENDS else pytest.mark.slow, id=f"sm_{each}") for each in CARDS],
)
def test_every_kernel_compiles(capability: int, every: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code, with Triton's compiler and NVIDIA's assembler, which need no driver: each kernel in the
    dtype of each card, and in the slow suite each of its forms in each dtype."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # nothing of an earlier version counts
    found = kernels()
    for name, builds in BUILDS.items():
        for types, constants in builds if every else some_of(builds, capability):
            options = {**OPTIONS, "num_warps": constants.get("num_warps", 4)}
            constants = {name: value for name, value in constants.items() if name != "num_warps"}
            source = ASTSource(found[name], {**types, **dict.fromkeys(constants, "constexpr")}, constants)
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            assert built.asm["cubin"], (name, types)
            assert f".target sm_{capability}" in built.asm["ptx"]
            assert built.metadata.shared <= SHARED_MEMORY[capability] * 1024, (name, types, built.metadata.shared)


@pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"),
    reason="Triton 3.6, which torch 2.11 brings, makes numbers of numpy's arrays of one element in its interpreter",
)
def test_every_kernel_equals_its_plain_function() -> None:
    """One process for all: the interpreter is chosen before triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_in_interpreter"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    launched = set(done.stdout.split())
    assert launched == set(BUILDS), "a kernel that nobody compared"
