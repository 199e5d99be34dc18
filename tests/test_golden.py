"""Golden runs: a change that should change nothing changes no bit of the losses and adapters of twenty steps.

Bits differ between processors and versions of torch, so `golden.json` keeps the losses once, and digests of every
result under a key that names what computed it. Where the key is known the bits must be the same; elsewhere the losses
must be close. A resumed run ends at the bits of an uninterrupted one everywhere.

After a change that is meant to change numbers:   pytest tests/test_golden.py --update-golden
That wants a line in docs/log.md that says why. On a machine without digests it adds this machine's to those of others;
where this machine's are known and have changed, those of others are of a run before the change and are dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lowrank.config import RunConfig
from lowrank.pipelines.train import train
from lowrank.report.events import Event, StepDone
from tests.checkpoint_folder import save_checkpoint_folder, write_alpaca

GOLDEN = Path(__file__).with_name("golden.json")
STEPS = 20
JOBS = ("lora", "dora")
STORAGES: dict[str, dict[str, Any]] = {"dense": {}, "nf4": {"storage": {"type": "nf4", "double_quant": True}}}


def settings(world: Path, out: Path, storage: str) -> dict[str, Any]:
    """Two jobs with everything that has a state: dropout, noise, schedules, shuffling."""
    return {
        "model": {"path": str(world / "model"), "dtype": "float32", "device": "cpu", **STORAGES[storage]},
        "data": {"train": [str(world / "train.json")], "eval": [str(world / "eval.json")], "batch_size": 4},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"type": "cosine", "warmup_steps": 2},
        "output_dir": str(out),
        "max_steps": STEPS,
        "save_steps": 6,
        "eval_steps": 5,
        "logging_steps": 1,
        "jobs": [
            {"name": JOBS[0], "adapter": {"rank": 4, "dropout": 0.1}, "neftune_noise_alpha": 5.0},
            {"name": JOBS[1], "adapter": {"type": "dora", "rank": 8, "dropout": 0.05}, "seed": 7},
        ],
    }


class StopAt:
    """A reporter that presses Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def report(self, event: Event) -> None:
        if isinstance(event, StepDone) and (event.job, event.step) == (JOBS[0], self._step):
            os.kill(os.getpid(), signal.SIGINT)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """A sum's bits depend on how many threads share it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    save_checkpoint_folder(folder / "model")
    write_alpaca(folder / "train.json", 40)
    write_alpaca(folder / "eval.json", 6, start=100)
    return folder


@pytest.fixture(scope="module", params=STORAGES)
def storage(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def straight(world: Path, storage: str) -> Path:
    """The folder of a run without interruption."""
    out = world / f"straight-{storage}"
    train(RunConfig(**settings(world, out, storage)))
    return out


def losses(out: Path) -> dict[str, list[float]]:
    """Every logged loss of every job, those on held-out rows last."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    kinds = ("step", "eval")
    return {
        f"{job} {kind}": [line["loss"] for line in lines if (line.get("job"), line["event"]) == (job, kind)]
        for job in JOBS
        for kind in kinds
    }


def digests(out: Path) -> dict[str, str]:
    """Of the losses, written exactly, and of every tensor of every last adapter."""
    found = {"losses": _digest(json.dumps(losses(out)).encode())}
    for job in JOBS:
        tensors = load_file(out / job / "last" / "adapter_model.safetensors")
        found[job] = _digest(*(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors)))
    return found


def what_computes() -> str:
    """Names the kernels behind the bits: versions, the processor's instructions, and what they make of a few sums."""
    generator = torch.Generator().manual_seed(0)
    x_TD, weight_OD, narrow_RD = (torch.randn(size, 32, generator=generator) for size in (61, 48, 4))
    probes = [
        x_TD @ weight_OD.T, x_TD @ narrow_RD.T, narrow_RD @ x_TD.T, x_TD.exp(), x_TD.softmax(-1), x_TD.norm(dim=0),
        torch.nn.functional.silu(x_TD), torch.rsqrt(x_TD.square().mean(-1) + 1e-6), x_TD.cos(), x_TD.sum(),
        torch.nn.functional.scaled_dot_product_attention(*(x_TD[None, None],) * 3, is_causal=True),
    ]  # fmt: skip
    probe = _digest(*(each.numpy().tobytes() for each in probes))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{versions}, {torch.backends.cpu.get_cpu_capability()}, {probe}"


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def updated(golden: dict[str, Any], came: dict[str, list[float]], here: str, exactly: dict[str, str]) -> dict[str, Any]:
    """`golden` of one storage with what came `here`. Losses and digests of others stay unless `here` shows that the
    numbers have moved: its own digests were known and are others now, or the losses are no longer close."""
    if golden["digests"].get(here, exactly) != exactly or not close(came, golden["losses"]):
        return {"losses": came, "digests": {here: exactly}}
    return {"losses": golden["losses"], "digests": {**golden["digests"], here: exactly}}


def close(came: dict[str, list[float]], expected: dict[str, list[float]]) -> bool:
    return came == {name: pytest.approx(each, rel=1e-4) for name, each in expected.items()}


def test_the_same_losses_as_ever(straight: Path, storage: str, request: pytest.FixtureRequest) -> None:
    came = losses(straight)
    assert [len(each) for each in came.values()] == [STEPS, STEPS // 5] * len(JOBS)

    golden = json.loads(GOLDEN.read_text("utf-8"))
    if request.config.getoption("--update-golden"):
        golden[storage] = updated(golden[storage], came, what_computes(), digests(straight))
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
    for name, expected in golden[storage]["losses"].items():
        assert came[name] == pytest.approx(expected, rel=1e-4), f"{name} moved"


def test_the_same_bits_as_ever(straight: Path, storage: str) -> None:
    known = json.loads(GOLDEN.read_text("utf-8"))[storage]["digests"]
    if what_computes() not in known:
        pytest.skip(
            f"bits are not compared: golden.json has none for this machine ({what_computes()}); it has those of "
            f"{'; '.join(known)}. On a commit that you trust, `pytest tests/test_golden.py --update-golden` adds them"
        )
    assert digests(straight) == known[what_computes()], "the losses are close, and their bits are not the same"


def test_an_update_keeps_what_other_machines_computed() -> None:
    came = {"lora step": [5.0, 4.0]}
    before = {"losses": came, "digests": {"theirs": {"lora": "1"}}}
    added = updated(before, {"lora step": [5.0, 4.0001]}, "ours", {"lora": "2"})
    assert added == {"losses": came, "digests": {"theirs": {"lora": "1"}, "ours": {"lora": "2"}}}
    assert updated(added, came, "ours", {"lora": "2"}) == added
    assert updated(added, came, "ours", {"lora": "3"})["digests"] == {"ours": {"lora": "3"}}
    assert updated(before, {"lora step": [5.0, 4.5]}, "ours", {"lora": "2"})["digests"] == {"ours": {"lora": "2"}}


def test_resumed_is_uninterrupted(world: Path, straight: Path, storage: str) -> None:
    out = world / f"parts-{storage}"
    given = settings(world, out, storage)
    assert train(RunConfig(**given), reporters=[StopAt(11)])["interrupted"]
    assert len(losses(out)[f"{JOBS[0]} step"]) == 11
    train(RunConfig(**given, resume=True))
    assert digests(out) == digests(straight)
