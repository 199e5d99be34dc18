"""How settings are written: once, beside the code that reads them.

A `Settings` class refuses unknown keys and cannot be changed once read. The docstring under a field
is its help text on every face (YAML, command line, JSON schema, web form). `choice_of` turns a
folder of files, each with its own `Config`, into one setting told apart by `type`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FieldSerializationInfo,
    PlainSerializer,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from lowrank.errors import did_you_mean


class Settings(BaseModel):
    """A group of settings: frozen, unknown keys refused, every field documented in place."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )


def configs_in(package: str) -> dict[str, type[Settings]]:
    """`{type name: Config}` of every module of `package` that defines a `Config`; the file name is the type."""
    found: dict[str, type[Settings]] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        config = getattr(importlib.import_module(f"{package}.{module.name}"), "Config", None)
        if config is not None:
            names = get_args(config.model_fields["type"].annotation)
            assert names == (module.name,), f"{package}.{module.name}: Config.type must be Literal[{module.name!r}]"
            found[module.name] = config
    return found


def choice_of(package: str, default: str, absent: Mapping[str, str] | None = None) -> Any:
    """The type of a setting whose `type` names a file of `package`, or a third party's `my_module:MyThing`.

    A third party's class carries its settings class as the attribute `Config`. Where `type` is left
    out, `default` is meant. `absent`: types that people know from elsewhere, and why they are not there.
    """
    configs = configs_in(package)
    union: Any = Union[tuple(configs.values())]  # noqa: UP007 (the members are not known to the parser)
    if len(configs) > 1:
        union = Annotated[union, Field(discriminator="type")]

    def resolve(value: Any, built_in: ValidatorFunctionWrapHandler) -> Any:
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, dict):
            return built_in(value)
        name = value.get("type", default)
        if isinstance(name, str) and ":" in name:
            return _third_party(name)(**{key: item for key, item in value.items() if key != "type"})
        if absent and isinstance(name, str) and name in absent:
            raise ValueError(f"there is no type {name!r} here: {absent[name]}")
        if not isinstance(name, str) or name not in configs:
            raise ValueError(f"there is no type {name!r}{did_you_mean(str(name), configs)}")
        return built_in({**value, "type": name})

    return Annotated[union, WrapValidator(resolve), PlainSerializer(_dumped)]


def _dumped(value: Settings, info: FieldSerializationInfo) -> dict[str, Any]:
    """By its own class: a third party's is no member of the union, which pydantic would warn about."""
    return value.model_dump(mode=info.mode, exclude_unset=info.exclude_unset, exclude_defaults=info.exclude_defaults)


def _third_party(name: str) -> type[Settings]:
    module_name, _, attribute = name.partition(":")
    try:
        thing = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import {name!r}: {error}") from error
    config = getattr(thing, "Config", None)
    if config is None:
        raise ValueError(f"{name} has no attribute `Config` (a lowrank.settings.Settings class)")
    if "type" not in config.model_fields or config.model_fields["type"].default != name:
        raise ValueError(f"{name}.Config needs the field `type: Literal[{name!r}] = {name!r}`, to be read back")
    return config


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Auto = Literal["auto"]
