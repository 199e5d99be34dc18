"""Lists that a person reads (help texts, README, pages) are what lies in the folders."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import lowrank
from lowrank.cli.export import export
from lowrank.cli.serve import serve
from lowrank.data.formats.built_in import built_in_formats
from lowrank.models.config import ModelConfig
from lowrank.records import Record
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


LISTS: list[tuple[str, Callable[[], Iterable[str]], str]] = [
    ("formats", built_in_formats, "docs/add-a-format.md"),
    ("records", lambda: [each.__name__ for each in typing.get_args(Record)], "docs/add-a-format.md"),
    ("records", lambda: [each.__name__ for each in typing.get_args(Record)], "docs/glossary.md"),
    ("storages", lambda: configs_in("lowrank.models.storages"), "docs/glossary.md"),
    ("engines", engine_names, "docs/serving.md"),
    ("trackers", known_trackers, "docs/add-a-reporter.md"),
]


@pytest.mark.parametrize(("kind", "names", "page"), LISTS, ids=[f"{kind}-{page}" for kind, _, page in LISTS])
def test_a_page_lists_what_there_is(kind: str, names: Callable[[], Iterable[str]], page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    missing = [name for name in names() if not re.search(rf"`(--engine )?{re.escape(name)}`", text)]
    assert not missing, f"{page} lacks {kind}"


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
