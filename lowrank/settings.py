"""How settings are written: once, beside the code that reads them.

A `Settings` class refuses unknown keys and cannot be changed once read. The docstring under a field
is its help text on every face (YAML, command line, JSON schema, web form). `choice_of` turns a
folder of files, each with settings of its own, into one setting told apart by `type`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FieldSerializationInfo,
    PlainSerializer,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from lowrank.errors import ConfigError, did_you_mean, raise_all
from lowrank.field_docs import field_docs
from lowrank.setting_problems import error_lines
from lowrank.third_party import PASS_OBJECTS_HINT, load_code, names_code

if TYPE_CHECKING:
    _Class = type(BaseModel)
else:

    class _Class(type(BaseModel)):
        """What a call of the class does; pydantic makes the groups inside of a group without one."""

        def __call__(cls, /, *unnamed: Any, **values: Any) -> Any:
            heading = f"{cls.__name__}: these settings cannot be used:"
            if unnamed:
                names = ", ".join(f"{name}=..." for name in list(cls.model_fields)[: len(unnamed)])
                raise ConfigError(f"{heading} they are given by name, {cls.__name__}({names})")
            problems: list[str] = []
            made: Any = None
            try:
                made = super().__call__(**values)
            except ValidationError as error:
                problems = cls.problems_of(error, values)
            raise_all(ConfigError, heading, problems)
            return made


class Settings(BaseModel, metaclass=_Class):
    """A group of settings: frozen, unknown keys refused, every field documented in place.

    Made directly (`RunConfig(...)`), it raises a ConfigError that lists every problem, as files do.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        defer_build=True,  # validators are built once, for the whole, and after the help texts are there
    )

    @classmethod
    def problems_of(cls, error: ValidationError, values: Mapping[str, Any]) -> list[str]:
        """What pydantic refused in the `values` of one, a line for each problem."""
        return error_lines(error, values, cls)

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        texts = field_docs(cls)
        for name, field in cls.__pydantic_fields__.items():
            if field.description is None:
                field.description = texts.get(name)


Kind = TypeVar("Kind", bound=Settings)
_LOADED: dict[str, type[Settings]] = {}
"""Third parties' settings that went through the door (third_party.py), by their `type`."""


def configs_in(package: str) -> dict[str, type[Settings]]:
    """`{type name: class}` of every module of `package` with settings of its own; the file name is the type."""
    found: dict[str, type[Settings]] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        config = _settings_of(importlib.import_module(f"{package}.{module.name}"))
        if config is not None:
            names = get_args(config.model_fields["type"].annotation)
            place = f"{package}.{module.name}: {config.__name__}.type"
            assert names == (module.name,), f"{place} must be Literal[{module.name!r}]"
            found[module.name] = config
    return found


def _settings_of(module: ModuleType) -> type[Settings] | None:
    """The one class of the module whose settings have a `type`."""
    classes = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    own = [each for each in classes if issubclass(each, Settings) and "type" in each.model_fields]
    assert len(own) < 2, f"{module.__name__} has {len(own)} classes of settings with a `type`; one file, one thing"
    return own[0] if own else None


def choice_of(
    package: str,
    default: str,
    absent: Mapping[str, str] | None = None,
    *,
    page: str = "docs/third-party-code.md",
    base: type[Settings] = Settings,
) -> Any:
    """The type of a setting whose `type` names a file of `package`, or a third party's `my_module:MyThing`.

    A third party's class carries its settings class, a subclass of `base`, as the attribute `Config`; it is imported
    only where that is allowed (third_party.py). Where `type` is left out, `default` is meant. `absent`: types that
    people know from elsewhere, and why they are not there. `page`: of docs, on how one is written.
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
        if names_code(name):
            return _third_party(name, base, page).model_validate(
                {key: item for key, item in value.items() if key != "type"}
            )
        if absent and isinstance(name, str) and name in absent:
            raise ValueError(f"there is no type {name!r} here: {absent[name]}")
        if not isinstance(name, str) or name not in configs:
            raise ValueError(f"there is no type {name!r}{did_you_mean(str(name), configs)}")
        return built_in({**value, "type": name})

    return Annotated[union, WrapValidator(resolve), PlainSerializer(_dumped)]


def _dumped(value: Settings, info: FieldSerializationInfo) -> dict[str, Any]:
    """By its own class: a third party's is no member of the union, which pydantic would warn about. Its `type` stands
    there whether anybody set it or not: without it, it would be read back as the default's."""
    values = value.model_dump(mode=info.mode, exclude_unset=info.exclude_unset, exclude_defaults=info.exclude_defaults)
    return {**values, "type": getattr(value, "type")}  # noqa: B009 (Settings have no `type`, those of a choice do)


def _third_party(name: str, base: type[Settings], page: str) -> type[Settings]:
    thing = load_code(name)
    config = getattr(thing, "Config", None)
    if config is None:
        raise ValueError(
            f"{name} has no attribute `Config` (a lowrank.settings.Settings class), by which settings alone could make "
            f"one; {PASS_OBJECTS_HINT}"
        )
    if not (isinstance(config, type) and issubclass(config, base)):
        raise ValueError(
            f"{name}.Config is {config!r}; expected a subclass of {base.__module__}.{base.__qualname__}: {page}"
        )
    if "type" not in config.model_fields or config.model_fields["type"].default != name:
        raise ValueError(f"{name}.Config needs the field `type: Literal[{name!r}] = {name!r}`, to be read back")
    _LOADED[name] = config
    return config


def loaded_third_parties(kind: type[Kind]) -> dict[str, type[Kind]]:
    """`{my_module:MyThing: settings class}` of the third parties of one kind that this process was allowed to load."""
    return {name: config for name, config in _LOADED.items() if issubclass(config, kind)}


Positive = Annotated[int, Field(gt=0, lt=2**63)]
NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Auto = Literal["auto"]
