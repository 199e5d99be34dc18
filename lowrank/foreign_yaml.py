"""YAML from anywhere, in bounded time and memory.

Plain values are read by the rules of 1.2: `1e-4` is a number, `no` and `1:30` are texts.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_VALUES = 1_000_000


def load_yaml(text: str, most: int = MOST_VALUES) -> Any:
    """The value, once it is known to be of at most so many: an alias may stand for a million copies, or for itself.

    yaml.YAMLError, and RecursionError for what is nested too deeply.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node, most)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_size(root: Any, most: int) -> None:
    """YAMLError where aliases make a value part of itself, or of more than `most`."""
    sizes: dict[int, int] = {}
    inside: set[int] = set()
    waiting: list[tuple[Any, bool]] = [(root, False)]
    while waiting:
        node, counted = waiting.pop()
        if id(node) in sizes:
            continue
        parts = [] if isinstance(node, yaml.ScalarNode) else _parts(node)
        if counted or not parts:
            sizes[id(node)] = 1 + sum(sizes[id(part)] for part in parts)
            inside.discard(id(node))
            if sizes[id(node)] > most:
                raise yaml.MarkedYAMLError(
                    problem=f"aliases (&, *) stand for more than {most:,} values", problem_mark=node.start_mark
                )
            continue
        inside.add(id(node))
        if any(id(part) in inside for part in parts):
            raise yaml.MarkedYAMLError(
                problem="an alias (*) stands for the value it is in", problem_mark=node.start_mark
            )
        waiting.append((node, True))
        waiting += [(part, False) for part in parts]


def _parts(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value)


class _Loader(yaml.SafeLoader):
    """The safe loader, with YAML 1.2's plain values and without duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (filled below, once)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice in one group", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        if len(text) > 100:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(text)} digits is none that a setting can have", node.start_mark
            )
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


_PLAIN_VALUES = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
for _name, (_pattern, _first) in _PLAIN_VALUES.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), [c if c != "\0" else "" for c in _first]
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
