"""Docstrings under fields are found as pydantic finds them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from pydantic._internal._docs_extraction import extract_docstrings_from_cls  # the oracle

from lowrank.config.schema import RunConfig
from lowrank.settings import Settings


def _all(kind: type[Settings]) -> list[type[Settings]]:
    return [kind, *(each for below in kind.__subclasses__() for each in _all(below))]


def test_every_settings_class_has_what_pydantic_finds() -> None:
    classes = [each for each in _all(Settings)[1:] if each.__module__.startswith("lowrank.")]
    assert RunConfig in classes
    assert len(classes) > 60
    for each in classes:
        for name, text in extract_docstrings_from_cls(each, use_inspect=True).items():
            if name in each.model_fields:
                assert each.model_fields[name].description == text, (each, name)


def test_classes_of_one_name_and_in_functions() -> None:
    def first() -> type[Settings]:
        class Own(Settings):
            a: int = 1
            """First."""

            def b(self) -> None:
                """No field."""

        return Own

    def second() -> type[Settings]:
        try:
            raise ValueError
        except ValueError:

            class Own(Settings):
                a: int = 2
                """Second,
                in two lines."""
                b: int = 3

        return Own

    one, two = first(), second()
    assert (one.model_fields["a"].description, two.model_fields["a"].description) == (
        "First.",
        "Second,\nin two lines.",
    )
    assert two.model_fields["b"].description is None
    assert one.model_json_schema()["properties"]["a"]["description"] == "First."
    assert one.model_validate({"a": 3}).model_dump() == {"a": 3}


def test_a_field_of_its_parent_keeps_its_text() -> None:
    class Parent(Settings):
        a: int = 1
        """Of the parent."""

    class Child(Parent):
        b: int = 2
        """Its own."""

    assert {name: field.description for name, field in Child.model_fields.items()} == {
        "a": "Of the parent.",
        "b": "Its own.",
    }


def test_without_source_there_are_no_texts() -> None:
    space: dict[str, Any] = {"__name__": "typed_in"}
    exec("from lowrank.settings import Settings\nclass Own(Settings):\n    a: int = 1\n    '''Text.'''\n", space)
    assert space["Own"].model_fields["a"].description is None
    assert space["Own"](a=2).a == 2


def test_modules_are_not_searched_for_each_class() -> None:
    """pydantic's own way looks for the module of every frame of every class, 1,100 times in all: half a second."""
    code = """
import inspect
searched, own = [], inspect.getmodule
inspect.getmodule = lambda *given: (searched.append(given), own(*given))[1]
import lowrank.config
print(sum(inspect.isframe(given[0]) for given in searched))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert int(done.stdout) < 400
