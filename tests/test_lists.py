"""Lists that a person reads (help texts, README, pages) are what lies in the folders."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest

import lowrank
from lowrank.cli.export import export
from lowrank.cli.serve import serve
from lowrank.models.config import ModelConfig
from lowrank.report.reporters.trackers import known_trackers
from lowrank.serve.engines import engine_names
from lowrank.settings import configs_in

ROOT = Path(lowrank.__file__).parent.parent
PAGES = {
    "lowrank.adapters.variants": ["README.md", "README.zh-CN.md", "docs/methods.md"],
    "lowrank.objectives": ["README.md", "README.zh-CN.md", "docs/methods.md"],
    "lowrank.train.optimizers": ["docs/methods.md"],
    "lowrank.models.storages": ["docs/quantization.md"],
    "lowrank.export.targets": ["docs/export.md"],
    "lowrank.contrib.layer_wrappers": ["docs/contrib.md"],
}


@pytest.mark.parametrize(("package", "page"), [(package, page) for package, pages in PAGES.items() for page in pages])
def test_a_page_names_all_of_a_folder(package: str, page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    assert not [name for name in configs_in(package) if f"`{name}`" not in text and f": {name}`" not in text]


def help_of(command: typing.Any, parameter: str) -> str:
    return typing.get_type_hints(command, include_extras=True)[parameter].__metadata__[0].help


def names_in(text: str) -> set[str]:
    return set(re.findall(r"[a-z][a-z0-9_.]*[a-z0-9]", text))


def test_helps_name_all_of_their_folder() -> None:
    targets = help_of(export, "to").partition("(")[2].partition(")")[0]
    assert names_in(targets) == set(configs_in("lowrank.export.targets"))
    assert set(engine_names()) <= names_in(help_of(serve, "engine"))


def test_settings_name_all_of_their_folder() -> None:
    storages = str(ModelConfig.model_fields["storage"].description)
    assert set(configs_in("lowrank.models.storages")) <= names_in(storages)
    reporters = str(lowrank.RunConfig.model_fields["report_to"].description).partition(", or a reporter")[0]
    assert set(known_trackers()) <= names_in(reporters)
