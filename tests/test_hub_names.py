"""What has the form of a repository's name on a hub."""

from __future__ import annotations

import pytest

from lowrank.hub_names import is_hub_name


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "o/m", "机构/模型", f"{'a' * 96}/{'b' * 96}"])
def test_owner_and_name(name: str) -> None:
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        "a/b/c",
        "/a",
        "a/",
        "../model",
        "./model",
        "a/..",
        "a/b..c",
        "a b/c",
        "-a/b",
        f"{'a' * 97}/b",
        "a/b\n",
    ],
)
def test_what_is_none(text: str) -> None:
    assert not is_hub_name(text)
