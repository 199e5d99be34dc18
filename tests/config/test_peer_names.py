"""Who writes what PEFT, TRL, transformers or LLaMA-Factory call a setting is given our name for it."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import lowrank
from lowrank.compat.llamafactory.keys import Keys
from lowrank.config import validate_settings
from lowrank.config.problems import _below
from lowrank.config.schema import RunConfig
from lowrank.errors import ConfigError, did_you_mean
from lowrank.field_docs import field_docs
from lowrank.peer_names import PEER_NAMES, PEER_OPTIONS
from lowrank.train.optimizers.adamw import AdamWConfig

BASE: dict[str, Any] = {"model": {"path": "lowrank/tiny"}, "data": {"train": "lowrank/demo"}, "output_dir": "out"}
PLACES = {".".join(map(str, place)) for place in _below(RunConfig)}
front: Any = lowrank
"""As a person without a type checker has it."""


def problems(**settings: Any) -> dict[str, str]:
    """What is wrong, by place."""
    given = {
        name: {**BASE.get(name, {}), **each} if isinstance(each, dict) else each for name, each in settings.items()
    }
    with pytest.raises(ConfigError) as caught:
        validate_settings({**BASE, **given})
    return dict(line.split(": ", 1) for line in caught.value.problems)


def test_everything_they_are_called_here_exists() -> None:
    there = PLACES | {*inspect.signature(lowrank.train).parameters}
    assert [ours for ours, _ in PEER_NAMES.values() if ours.partition(":")[0] not in there] == []


@pytest.mark.parametrize("ours", sorted({ours for ours, _ in PEER_NAMES.values() if ":" in ours}))
def test_a_value_that_is_named_can_be_set(ours: str) -> None:
    path, _, value = ours.partition(": ")
    *group, name = path.split(".")
    literal = {"true": True, "false": False}.get(value, value)
    more = {group[0]: {**BASE.get(group[0], {}), name: literal}} if group else {name: literal}
    validate_settings({**BASE, **more})


def test_a_name_of_theirs_is_none_of_ours_at_the_same_place() -> None:
    assert {name for name in PEER_NAMES if name in PLACES} == set()


def test_each_is_given_our_name_with_its_whole_path() -> None:
    found = problems(**dict.fromkeys(PEER_NAMES, 1))
    for theirs, (ours, about) in PEER_NAMES.items():
        assert found[theirs] == f"unknown key; it is called {ours!r} here" + (f": {about}" if about else "")


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("adapter.r", "adapter.rank"),
        ("adapter.lora_alpha", "adapter.alpha"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("data.per_device_train_batch_size", "data.batch_size"),
        ("model.load_in_4bit", "model.storage: nf4"),
        ("target_modules", "adapter.target_modules"),
        ("max_length", "data.max_length"),
        ("weight_decay", "optimizer.weight_decay"),
        ("optimizer.warmup_ratio", "schedule.warmup_ratio"),
    ],
)
def test_the_whole_path_wherever_it_is_written(place: str, expected: str) -> None:
    group, _, key = place.rpartition(".")
    line = problems(**({group: {key: 1}} if group else {key: 1}))[place]
    assert re.search(r"'(.*?)'", line)[1] == expected  # type: ignore[index]


@pytest.mark.parametrize("place", ["data.seed", "optimizer.num_train_epochs", "schedule.max_steps", "model.bf16"])
def test_what_stands_in_the_wrong_group(place: str) -> None:
    group, key = place.split(".")
    expected = "it is called 'model.dtype: bfloat16' here" if key == "bf16" else "it belongs at the top level"
    assert problems(**{group: {key: 1}})[place] == f"unknown key; {expected}"


def test_in_an_entry_of_jobs() -> None:
    found = problems(jobs=[{"name": "a", "lora_r": 4, "fp16": True}])
    assert found == {
        "jobs.0.lora_r": "unknown key; it is called 'adapter.rank' here",
        "jobs.0.fp16": "unknown key; it is called 'model.dtype: float16' here, at the top level",
    }


def test_in_a_sweep() -> None:
    line = problems(sweep={"grid": {"lora_r": [4, 8]}})["sweep.grid.lora_r"]
    assert line == "jobs have no such setting; it is called 'adapter.rank' here"


def test_in_a_group_made_by_itself_and_in_generation() -> None:
    for make, given, ours in (
        (AdamWConfig, {"lr": 1e-4}, "'learning_rate' here"),
        (front.GenerationConfig, {"do_sample": False}, "'temperature' here: 0 takes the likeliest token"),
        (front.GenerationConfig, {"max_tokens": 4}, "'max_new_tokens' here"),
    ):
        with pytest.raises(ConfigError, match=f"unknown key; it is called {ours}"):
            make(**given)
    with pytest.raises(ConfigError, match="max_tokens: unknown keyword; it is called 'max_new_tokens' here"):
        front.evaluate("lowrank/tiny", [], max_tokens=4)


def test_options_they_are_called_here_exist() -> None:
    for owner, names in PEER_OPTIONS.items():
        parameters = inspect.signature(getattr(front, owner)).parameters
        known = getattr(front, owner).model_fields if owner == "GenerationConfig" else parameters
        assert {ours for ours, _ in names.values()} <= set(known), owner
        assert names.keys().isdisjoint(known), owner


def test_what_llamafactory_calls_otherwise_is_here() -> None:
    """Where one key is one setting, by the page of its keys."""
    for key, text in field_docs(Keys).items():
        one = re.fullmatch(r"`([\w.]+)`(?:[;,] .*)?", " ".join(text.split()))
        if one is None or one[1] not in PLACES or one[1].rpartition(".")[2] == key:
            continue
        assert key in PEER_NAMES, f"{key} is {one[1]} here"
        assert PEER_NAMES[key][0].partition(":")[0] in (one[1], f"{one[1]}.type"), key


@pytest.mark.parametrize(
    ("given", "known", "meant"),
    [("LoRA", ["lora", "lora_fa", "loha"], "lora"), ("AdamW", ["badam", "adamw"], "adamw"),
     ("all_linear", ["all-linear", "linear"], "all-linear"), ("rnk", ["rank"], "rank")],
)  # fmt: skip
def test_the_same_but_for_case_comes_first(given: str, known: list[str], meant: str) -> None:
    assert did_you_mean(given, known) == f"; did you mean {meant!r}?"


def test_an_object_is_named_and_not_printed() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["v_proj", "q_proj"], bias="all")
    with pytest.raises(ConfigError) as caught:
        front.train(**BASE, adapter=config)
    assert str(caught.value) == (
        "adapter: peft's LoraConfig cannot be used; give adapter={'rank': 4, 'alpha': 8, 'dropout': 0.1, "
        "'target_modules': ['q_proj', 'v_proj']}; it also sets bias: see docs/settings.md for what they are called here"
    )
