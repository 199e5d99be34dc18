"""A base in parts, one on each device: the bits of a whole one, in runs that go on with any number of devices."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank.checkpoints.live_commands import replies, send
from lowrank.checkpoints.packed_model import quantize_model
from lowrank.config import RunConfig
from lowrank.models.config import ModelConfig
from lowrank.pipelines import rank_placement
from lowrank.pipelines.launch import train
from lowrank.pipelines.rank_placement import choose_placement
from lowrank.pipelines.train import train as train_here
from tests.pipelines.forked import forked_processes
from tests.pipelines.live_runs import ScriptedReporter, make_world, weights
from tests.pipelines.sharded_runs import align, on_ranks
from tests.pipelines.test_ranks import losses, settings


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_world(tmp_path_factory.mktemp("world"))
    align(world / "model" / "model.safetensors")
    return world


def sharded(world: Path, out: Path, storage: Any = "nf4", model: Any = (), **changes: Any) -> dict[str, Any]:
    """Passes of at most 64 tokens, so that some ranks have more of them than others."""
    own = settings(world, out, **{"max_steps": 3, "save_steps": None, "micro_batch_tokens": 64, **changes})
    own["model"] |= {"storage": storage, **dict(model)}
    return own


def same(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []
    assert losses(one) == losses(other)


def test_nf4_in_two_parts_gives_the_bits_of_the_whole(world: Path, tmp_path: Path) -> None:
    """LoRA with dropout, and DoRA, whose norm reads the frozen weights after each step. The two read their halves of
    what `lowrank quantize` has written; the one packs the weights itself."""
    copy = str(copied(world / "model", tmp_path / "copy", "nf4"))
    with forked_processes():
        train(RunConfig(**sharded(world, tmp_path / "two", "dense", {"path": copy}, devices=2, base="sharded")))
    train_here(RunConfig(**sharded(world, tmp_path / "one", lanes=2)))
    same(tmp_path / "two", tmp_path / "one")


def copied(model: Path, place: Path, storage: str) -> Path:
    config: Any = {"path": str(model), "storage": storage, "dtype": "float32", "device": "cpu"}
    quantize_model(ModelConfig(**config), place)
    return place


def test_the_process_group_is_told_the_number_of_its_gpu(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's wants one, and `auto` says `cuda`. No GPU is here."""
    monkeypatch.setattr(rank_placement, "choose_device", lambda model: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(rank_placement, "Sharded", lambda device, *sizes: device)
    monkeypatch.setattr(rank_placement, "Streamed", lambda device, *memory: device)
    begun: list[torch.device] = []
    ranks: Any = SimpleNamespace(world=2, rank=0, begin=begun.append, exchange=lambda value: [value, value])
    config = RunConfig(**sharded(world, world / "x", base="sharded", devices=2))
    assert choose_placement(config, ranks, pytest.fail) == torch.device("cuda", 3)
    assert begun == [torch.device("cuda", 3)]
    streamed = config.model_copy(update={"base": "streamed"})
    assert choose_placement(streamed, ranks, pytest.fail) == torch.device("cuda", 3)


def refused(world: Path, **changes: Any) -> str:
    with pytest.raises(ValueError) as caught:
        RunConfig(**sharded(world, world / "x", **{"base": "sharded", "devices": 2, **changes}))
    return str(caught.value)


def test_what_cannot_be_done_on_parts_is_said_before_anything_loads(world: Path) -> None:
    one = {"jobs": [], "storage": "dense"}
    assert "tuning: full trains the base's own parameters" in refused(world, tuning="full", **one)
    assert "share no base" in refused(world, parallelism="jobs")
    assert "sqrt" in refused(world, model={"activation_checkpointing": "sqrt"})
    assert "generates answers" in refused(world, eval_metric="exact_match")
    assert "modules_to_save" in refused(world, jobs=[], adapter={"modules_to_save": ["lm_head"]})


CASES: dict[str, dict[str, Any]] = {
    "dense": {"storage": "dense"},
    "bfloat16": {"storage": "dense", "model": {"dtype": "bfloat16"}},
    "double": {"storage": {"type": "nf4", "double_quant": True}},
    "full": {"model": {"activation_checkpointing": "full"}},
    "selective": {"model": {"activation_checkpointing": "selective"}},
    "padded": {"model": {"attention": "padded"}},
    "pissa": {"jobs": [], "adapter": "pissa", "storage": "dense"},
    "adalora": {"jobs": [], "adapter": "adalora"},
    "eva": {"jobs": [], "adapter": "eva"},
    "loftq": {"jobs": [], "adapter": "loftq"},
    "lokr": {"jobs": [], "adapter": "lokr"},
    "prompt tuning": {"jobs": [], "adapter": "prompt_tuning"},
    "prefix tuning": {"jobs": [], "adapter": "prefix_tuning"},
    "houlsby": {"jobs": [], "adapter": "houlsby"},
    "one layer": {"jobs": [], "adapter": {"rank": 4, "target_modules": ["layers.1.mlp.up_proj"]}},
    "averaged": {
        "jobs": [],
        "adapter": "dora",
        "optimizer": {"type": "schedule_free", "learning_rate": 0.01},
        "schedule": "constant",
    },
}


@pytest.mark.slow
def test_every_way_of_training(world: Path, tmp_path: Path) -> None:
    """On parts, without a difference in any bit. And DPO, with references of the base. About 3 minutes."""
    pairs = tmp_path / "pairs.jsonl"
    row = {"chosen": "1 2 3", "rejected": "no"}
    pairs.write_text("".join(json.dumps({"prompt": f"Count to {n}.", **row}) + "\n" for n in range(12)))
    dpo = {"jobs": [], "objective": "dpo", "data": {"train": [str(pairs)], "batch_size": 4}, "eval_steps": None}
    cases = {**CASES, "dpo": dpo}
    runs = []
    for name, changes in cases.items():
        train_here(RunConfig(**sharded(world, tmp_path / f"one-{name}", lanes=2, **changes)))
        runs.append(sharded(world, tmp_path / f"two-{name}", base="sharded", **changes))
    assert on_ranks(runs, tmp_path) == ["done"] * len(runs)
    for name in cases:
        same(tmp_path / f"two-{name}", tmp_path / f"one-{name}")


@pytest.mark.slow
def test_two_machines_and_another_number_of_devices(world: Path, tmp_path: Path) -> None:
    """Four ranks, on two machines as far as they know, each of which holds the base once. A checkpoint of two ranks
    goes on on four, and one of four on one that holds all of it."""
    given = {
        "lanes": 4,
        "save_steps": 2,
        "base": "sharded",
        "schedule": {"type": "constant"},
        "data": {**settings(world, tmp_path)["data"], "batch_size": 8},
    }
    straight = tmp_path / "straight"
    train_here(RunConfig(**sharded(world, straight, max_steps=6, **{**given, "base": "replicated"})))
    assert on_ranks([sharded(world, tmp_path / "run", max_steps=2, **given)], tmp_path) == ["done"]
    on = sharded(world, tmp_path / "run", max_steps=4, resume=True, **given)
    assert on_ranks([on], tmp_path, world=4, local=2) == ["done"]
    train_here(RunConfig(**sharded(world, tmp_path / "run", max_steps=6, resume=True, **given)))
    ours, theirs = weights(tmp_path / "run"), weights(straight)
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


@pytest.mark.slow
def test_a_job_that_comes_later_and_what_no_device_holds(world: Path, tmp_path: Path) -> None:
    jobs = [{"name": "a", "adapter": {"rank": 4}}, {"name": "b", "adapter": {"type": "dora", "rank": 4}}]
    late = {"jobs": jobs, "max_concurrent_jobs": 1}
    train_here(RunConfig(**sharded(world, tmp_path / "one", lanes=2, **late)))
    head = {"jobs": [], "adapter": {"rank": 4, "target_modules": ["embed_tokens"]}}
    runs = [
        sharded(world, tmp_path / "two", base="sharded", **late),
        sharded(world, tmp_path / "head", base="sharded", **head),
        sharded(world, tmp_path / "three", base="sharded", shard_size=3),
    ]
    outcomes = on_ranks(runs, tmp_path)
    assert outcomes[0] == "done"
    assert "embed_tokens: the device does not hold it" in outcomes[1]
    assert "shard_size: 3 does not divide the 2 devices" in outcomes[2]
    same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["replicated", "sharded"])
def test_commands_are_carried_out_by_all_ranks_at_the_same_step(world: Path, tmp_path: Path, base: str) -> None:
    """Set, pause, resume, add and stop, sent from outside: the first rank reads them, all do them, and one process that
    is told the same at the same steps has the same bits."""
    late = RunConfig(**settings(world, tmp_path, jobs=[{"name": "late", "adapter": {"rank": 2}}])).jobs[0]
    commands = [
        ("set", "dora", {"changes": ["optimizer.learning_rate=0.003"]}),
        ("pause", "dora", None),
        ("add", None, {"settings": late.model_dump(mode="json")}),
        ("resume", "dora", None),
        ("stop", "late", None),
    ]
    given = {"max_steps": 60, "schedule": {"type": "constant"}, "eval_steps": None, "data": {"batch_size": 2}}
    given["data"] |= {"train": settings(world, tmp_path)["data"]["train"]}

    def sends(out: Path, number: int) -> Any:
        return lambda: send(out, *commands[number])

    two, one = tmp_path / "two", tmp_path / "one"
    plan = {f"lora{3 + 6 * number}": sends(two, number) for number in range(len(commands))}
    train(RunConfig(**sharded(world, two, devices=2, base=base, **given)), reporters=[ScriptedReporter(two, **plan)])
    carried_out = replies(two)
    assert [carried_out[number].done for number in range(1, len(commands) + 1)] == [True] * len(commands)

    iterations = [carried_out[number + 1].iteration for number in range(len(commands))]
    assert iterations == sorted(set(iterations))
    assert iterations[-1] < 60, "a machine that is loaded may need more steps"
    again = {f"lora{iteration}": sends(one, number) for number, iteration in enumerate(iterations)}
    train_here(RunConfig(**sharded(world, one, lanes=2, **given)), reporters=[ScriptedReporter(one, **again)])
    assert [replies(one)[number + 1].iteration for number in range(len(commands))] == iterations
    same(two, one)
