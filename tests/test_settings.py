"""How settings are written and chosen: refusals, suggestions, files found by name, third parties."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, TypeAdapter, ValidationError

import lowrank
from lowrank.errors import ConfigError, DataError, LowrankError, ModelError, OutputError, did_you_mean, raise_all
from lowrank.settings import Settings, choice_of, configs_in

FOLDERS = ["lowrank.adapters.variants", "lowrank.models.storages", "lowrank.objectives"]


class Small(Settings):
    """A group."""

    rank: int = Field(default=4, gt=0)
    """Rank of it."""


class OutsideConfig(Settings):
    """Somebody else's."""

    type: Literal["tests.test_settings:Outside"] = "tests.test_settings:Outside"
    strength: float = 1.0
    """How much."""


class Outside:
    Config = OutsideConfig


class NoType:
    Config = Small


@pytest.fixture(params=FOLDERS)
def choice(request: pytest.FixtureRequest) -> tuple[TypeAdapter[Any], dict[str, Any]]:
    configs = configs_in(request.param)
    return TypeAdapter(choice_of(request.param, default=next(iter(configs)))), configs


def test_settings_are_strict_frozen_and_documented() -> None:
    with pytest.raises(ConfigError, match="rnak: unknown key; did you mean 'rank'"):
        Small(rnak=3)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="frozen"):
        Small().rank = 5
    with pytest.raises(ConfigError, match="rank: expected a number above 0, got 0"):
        Small(rank=0)
    assert Small.model_json_schema()["properties"]["rank"]["description"] == "Rank of it."


@pytest.mark.parametrize("package", FOLDERS)
def test_every_file_of_a_folder_is_found_by_its_name(package: str) -> None:
    folder = Path(importlib.import_module(package).__path__[0])
    files = {path.stem for path in folder.glob("*.py") if path.stem != "__init__"}
    with_config = {
        name for name in files if f'    type: Literal["{name}"]' in (folder / f"{name}.py").read_text("utf-8")
    }
    assert set(configs_in(package)) == with_config
    assert with_config


def test_a_choice_by_name_by_group_and_by_default(choice: tuple[TypeAdapter[Any], dict[str, Any]]) -> None:
    adapter, configs = choice
    default = next(iter(configs.values()))
    assert type(adapter.validate_python({})) is default
    for name, config in configs.items():
        for value in (name, {"type": name}, config()):
            assert type(adapter.validate_python(value)) is config
        dumped = json.loads(adapter.dump_json(config()))
        assert dumped["type"] == name
        assert adapter.validate_python(dumped) == config()


def test_an_unknown_type_gets_a_suggestion() -> None:
    adapter = TypeAdapter(choice_of("lowrank.adapters.variants", default="lora"))
    with pytest.raises(ValidationError, match="there is no type 'lroa'; did you mean 'lora'"):
        adapter.validate_python({"type": "lroa"})
    with pytest.raises(ValidationError, match=r"there is no type 'zzzz'; known: .*lora.*rslora"):
        adapter.validate_python("zzzz")
    with pytest.raises(ValidationError, match="rnak"):
        adapter.validate_python({"type": "lora", "rnak": 3})


@pytest.mark.parametrize("nonsense", [["lora"], {"lora": 1}, 3, None, True])
def test_a_type_that_is_no_name_is_an_error_and_no_crash(nonsense: Any) -> None:
    adapter = TypeAdapter(choice_of("lowrank.adapters.variants", default="lora"))
    with pytest.raises(ValidationError, match="there is no type "):
        adapter.validate_python({"type": nonsense})


@pytest.mark.parametrize("nonsense", [3, None, ["lora"]])
def test_a_choice_that_is_no_group(nonsense: Any) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(choice_of("lowrank.adapters.variants", default="lora")).validate_python(nonsense)


@pytest.mark.usefixtures("allowed_code")
def test_a_third_partys_class_goes_in_and_out() -> None:
    name = "tests.test_settings:Outside"
    adapter = TypeAdapter(choice_of("lowrank.objectives", default="sft"))
    chosen = adapter.validate_python({"type": name, "strength": 2.5})
    assert chosen == OutsideConfig(strength=2.5)
    dumped = json.loads(adapter.dump_json(chosen))
    assert dumped == {"type": name, "strength": 2.5}
    assert adapter.validate_python(dumped) == chosen
    assert adapter.dump_python(chosen, exclude_unset=True) == {"type": name, "strength": 2.5}
    assert adapter.dump_python(OutsideConfig(), exclude_unset=True) == {"type": name}
    with pytest.raises(ValidationError, match="weak"):
        adapter.validate_python({"type": name, "weak": 1})


@pytest.mark.usefixtures("allowed_code")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Thing", "cannot import 'no_such_module:Thing': No module named"),
        ("tests.test_settings:Nothing", "cannot import .* has no attribute 'Nothing'"),
        ("tests.test_settings:FOLDERS", "has no attribute `Config`"),
        ("tests.test_settings:NoType", "NoType.Config needs the field `type: Literal"),
    ],
)
def test_a_third_partys_mistakes(name: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(choice_of("lowrank.objectives", default="sft")).validate_python({"type": name})


def test_every_group_of_settings_in_the_package_documents_itself() -> None:
    """The docstring under a field is its help text everywhere."""
    missing = []
    for module in pkgutil.walk_packages(lowrank.__path__, "lowrank."):
        if module.name.endswith("__main__"):
            continue
        for kind in vars(importlib.import_module(module.name)).values():
            own = isinstance(kind, type) and issubclass(kind, Settings) and kind.__module__ == module.name
            if own and kind is not Settings:
                if not kind.__doc__:
                    missing.append(f"{module.name}.{kind.__name__}")
                missing += [
                    f"{module.name}.{kind.__name__}.{name}"
                    for name, info in kind.model_fields.items()
                    if name != "type" and not info.description
                ]
    assert missing == []


def test_errors_are_value_errors_with_their_own_exit_codes() -> None:
    kinds = [LowrankError, ConfigError, DataError, ModelError, OutputError]
    assert len({kind.exit_code for kind in kinds}) == len(kinds)
    assert all(issubclass(kind, ValueError) for kind in kinds)


def test_all_problems_at_once_or_none() -> None:
    raise_all(DataError, "nothing wrong", [])
    with pytest.raises(DataError, match="two things\n  - this\n  - that") as caught:
        raise_all(DataError, "two things", ["this", "that"])
    assert str(caught.value).count("\n") == 2


def test_suggestions() -> None:
    assert did_you_mean("rnak", ["rank", "alpha"]) == "; did you mean 'rank'?"
    assert did_you_mean("zzz", ["rank", "alpha"]) == "; known: alpha, rank"
    assert did_you_mean("zzz", []) == ""
