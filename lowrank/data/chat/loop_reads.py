"""What a turn of a template's loop can read of what was before the loop, found out from its syntax.

Assignments within a loop of Jinja end with its turn, so turns know of one another by namespaces alone. That leaves the
names that the template's own scope assigns: those that a loop reads, those it only compares with `<` and `>`, and the
attributes of namespaces that it assigns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import nodes

INNER = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.With, nodes.Block)
"""Scopes or outputs of their own."""
MIRRORED = {"gt": "lt", "lt": "gt", "gteq": "lteq", "lteq": "gteq", "eq": "eq", "ne": "ne"}
"""Comparisons, with sides exchanged."""
_ARITHMETIC = (nodes.Add, nodes.Sub)


@dataclass(frozen=True)
class LoopReads:
    """Of one loop. A name is `name`, or `name.attribute` for a namespace's.

    exact        names whose values matter
    compared     names whose values are compared, and not looked at otherwise
    assigned     attributes of namespaces that its turns assign, by name; None: any
    comparisons  those of `compared`: by the id of the node, the name and whether it is on the left
    idle_without `(name, attribute)` of a namespace without which a turn does nothing
    """

    exact: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()
    assigned: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    comparisons: Mapping[int, tuple[str, bool]] = field(default_factory=dict)
    idle_without: tuple[str, str] | None = None


class TemplateReads:
    """For one template as it was parsed. `names`: what its own scope assigns."""

    def __init__(self, template: nodes.Template) -> None:
        self.names = tuple(sorted(_assigned(template.body)))
        self._macros = _Reads(self.names)
        for macro in template.find_all(nodes.Macro):
            self._macros.look(macro)

    def of_loop(self, loop: nodes.For) -> LoopReads:
        """What its body reads, with all that macros could."""
        own, macros = _Reads(self.names), self._macros
        for statement in loop.body:
            own.look(statement)
        whole = own.whole | macros.whole | {name for name, _ in macros.attributes | macros.assigned}
        whole |= {key[0] for key, _ in macros.comparisons.values()}
        touched = own.attributes | own.assigned
        compared = {
            node: (key, left)
            for node, (key, left) in own.comparisons.items()
            if key[0] not in whole and key not in touched and (key[1] or key[0] not in {name for name, _ in touched})
        }
        kept = {key for key, _ in compared.values()}
        exact = touched | {key for key, _ in own.comparisons.values() if key not in kept}
        exact = {key for key in exact if key[0] not in whole} | {(name, "") for name in whole}
        assigned: dict[str, tuple[str, ...] | None] = {
            name: tuple(sorted(attribute for each, attribute in own.assigned if each == name))
            for name, _ in own.assigned
        }
        return LoopReads(
            tuple(sorted(map(_written, exact))),
            tuple(sorted(map(_written, kept))),
            {**assigned, **dict.fromkeys(whole)},
            {node: (_written(key), left) for node, (key, left) in compared.items()},
            _idle_without(loop, self.names),
        )


_Key = tuple[str, str]
"""Name and attribute, which is empty for the name itself."""


class _Reads:
    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self.whole: set[str] = set()
        self.attributes: set[_Key] = set()
        self.assigned: set[_Key] = set()
        self.comparisons: dict[int, tuple[_Key, bool]] = {}

    def look(self, node: nodes.Node) -> None:
        if isinstance(node, nodes.NSRef):
            if node.name in self._names:
                self.assigned.add((node.name, node.attr))
        elif isinstance(node, nodes.Compare) and len(node.ops) == 1 and node.ops[0].op in MIRRORED:
            self._compare(node)
        elif (key := self._key(node)) is not None:
            if key[1]:
                self.attributes.add(key)
            else:
                self.whole.add(key[0])
        else:
            for child in node.iter_child_nodes():
                self.look(child)

    def _compare(self, node: nodes.Compare) -> None:
        sides = node.expr, node.ops[0].expr
        keys = tuple(map(self._key, sides))
        for key, side in zip(keys, sides):
            if key is None or None not in keys:
                self.look(side)
        for key, left in zip(keys, (True, False)):
            if key is not None and None in keys:
                self.comparisons[id(node)] = key, left

    def _key(self, node: nodes.Node) -> _Key | None:
        if isinstance(node, nodes.Name) and node.name in self._names:
            return node.name, ""
        attribute = None
        if isinstance(node, nodes.Getattr):
            attribute = node.attr
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            attribute = node.arg.value
        inner = self._key(node.node) if isinstance(node, (nodes.Getattr, nodes.Getitem)) and attribute else None
        return (inner[0], attribute) if inner is not None and not inner[1] and attribute else None


def _written(key: _Key) -> str:
    return f"{key[0]}.{key[1]}" if key[1] else key[0]


def _assigned(body: Sequence[nodes.Node]) -> set[str]:
    """Names that the statements of one scope assign."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, nodes.Macro):
            names.add(node.name)
        elif isinstance(node, (nodes.Assign, nodes.AssignBlock)):
            names |= {name.name for name in _with_itself(node.target, nodes.Name)}
        elif not isinstance(node, INNER):
            names |= _assigned(list(node.iter_child_nodes()))
    return names


def _with_itself(node: nodes.Node, kind: type[nodes.Name]) -> Iterator[nodes.Name]:
    if isinstance(node, kind):
        yield node
    yield from node.find_all(kind)


def _idle_without(loop: nodes.For, names: Sequence[str]) -> tuple[str, str] | None:
    """Where a turn is arithmetic and one `if` that begins with a namespace's attribute, as in a search for the last
    question from behind, whose other turns do nothing."""
    if loop.test or loop.recursive or loop.else_:
        return None
    found = None
    for statement in loop.body:
        if isinstance(statement, nodes.If) and found is None and not statement.elif_ and not statement.else_:
            found = statement
        elif isinstance(statement, nodes.Output):
            if not all(isinstance(each, nodes.TemplateData) and not each.data for each in statement.nodes):
                return None
        elif not _assigns_arithmetic(statement):
            return None
    if found is None or any(not _is_place(node) for node in _uses_of_loop(loop)):
        return None
    first = found.test
    while isinstance(first, nodes.And):
        first = first.left
    if isinstance(first, nodes.Getattr) and isinstance(first.node, nodes.Name) and first.node.name in names:
        return first.node.name, first.attr
    return None


def _assigns_arithmetic(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name) and _is_arithmetic(node.node)


def _is_arithmetic(node: nodes.Node) -> bool:
    if isinstance(node, _ARITHMETIC):
        return _is_arithmetic(node.left) and _is_arithmetic(node.right)
    if isinstance(node, nodes.Filter):
        return node.name in ("length", "count") and isinstance(node.node, nodes.Name) and not node.args
    return (isinstance(node, nodes.Const) and isinstance(node.value, int)) or _is_place(node)


def _is_place(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Getattr) and node.attr in ("index", "index0") and _is_loop(node.node)


def _is_loop(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == "loop"


def _uses_of_loop(loop: nodes.For) -> Iterator[nodes.Node]:
    """What stands around each `loop` of the body."""
    waiting: list[nodes.Node] = list(loop.body)
    while waiting:
        node = waiting.pop()
        for child in node.iter_child_nodes():
            if _is_loop(child):
                yield node
            waiting.append(child)
