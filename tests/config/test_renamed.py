"""Files with the names of old settings are refused with the new names."""

from __future__ import annotations

import pytest

from lowrank.config import validate_settings
from lowrank.config.schema import RunConfig
from lowrank.errors import ConfigError
from lowrank.renamed import RENAMED
from lowrank.settings import Settings


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_the_message_has_the_new_name(old: str, new: str) -> None:
    group, key = old.split(".")
    given = {"model": {"path": "lowrank/tiny"}, "data": {"train": "lowrank/demo"}, "output_dir": "out"}
    given[group] = {**given.get(group, {}), key: "none"}
    with pytest.raises(ConfigError, match=f"{old}: .*'{new}' now"):
        validate_settings(given)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_the_new_name_is_there_and_the_old_one_is_not(old: str, new: str) -> None:
    for name, is_there in ((old, False), (new, True)):
        group: type[Settings] = RunConfig
        *parents, key = name.split(".")
        for parent in parents:
            annotation = group.model_fields[parent].annotation
            assert isinstance(annotation, type)
            assert issubclass(annotation, Settings)
            group = annotation
        assert (key in group.model_fields) is is_there
