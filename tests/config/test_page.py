"""The schema as others see it: docs/settings.md, the JSON schema, and who reads a setting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lowrank
from lowrank.adapters.config import AdapterSettings
from lowrank.config import JobConfig, RunConfig
from lowrank.config.page import settings_page
from lowrank.settings import Settings, configs_in

ROOT = Path(lowrank.__file__).parent
GROUPS: tuple[str, ...] = ("lowrank.adapters.variants", "lowrank.objectives", "lowrank.models.storages")


def all_groups(group: type[Settings] = RunConfig) -> Iterator[type[Settings]]:
    """Every class of settings reachable from a run's."""

    def classes(annotation: Any) -> Iterator[type[Settings]]:
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            yield annotation
        for part in getattr(annotation, "__args__", ()):
            yield from classes(part)

    yield group
    for field in group.model_fields.values():
        for inner in classes(field.annotation):
            yield from all_groups(inner)


def test_the_page_is_current() -> None:
    page = ROOT.parent / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == settings_page(), "python -m lowrank.config.page > docs/settings.md"


def test_every_setting_is_documented() -> None:
    groups = {*all_groups(), *(config for package in GROUPS for config in configs_in(package).values())}
    assert {RunConfig, JobConfig} < groups
    assert any(issubclass(group, AdapterSettings) for group in groups)
    bare = [
        f"{group.__module__}.{group.__name__}.{name}"
        for group in groups
        for name, field in group.model_fields.items()
        if name != "type" and not (field.description or "").strip()
    ]
    assert bare == []


def test_every_setting_is_read_somewhere() -> None:
    read: set[str] = set()
    for path in ROOT.rglob("*.py"):
        if path.parent.name in ("config", "compat", "cli"):
            continue  # checking or printing a setting is not obeying it
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
    unread = sorted(
        {f"{group.__name__}.{name}" for group in all_groups() for name in group.model_fields if name not in read}
    )
    # `jobs[i].type` chooses the class, whose `build` is what is called
    assert [name for name in unread if not name.endswith(".type")] == []


def test_the_json_schema_tells_types_apart() -> None:
    schema = RunConfig.model_json_schema()
    adapter = schema["properties"]["adapter"]
    assert adapter["discriminator"]["propertyName"] == "type"
    assert set(adapter["discriminator"]["mapping"]) == set(configs_in("lowrank.adapters.variants"))
    assert schema["required"] == ["model", "output_dir"]
    assert schema["$defs"]["JobConfig"]["required"] == ["name"]
    assert schema["additionalProperties"] is False
    assert "seed" in schema["properties"]
    assert schema["properties"]["seed"]["description"]
