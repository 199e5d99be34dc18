"""What the seams' docstrings and the pages `docs/add-a*.md` put in backticks is there, under that name and with those
parameters: a sentence about a member that was renamed since leads whoever writes a new file astray."""

from __future__ import annotations

import ast
import builtins
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import lowrank

PACKAGE = Path(lowrank.__file__).parent
DOCS = PACKAGE.parent / "docs"
SEAMS = [
    "adapters/bottleneck.py", "adapters/config.py", "adapters/peft_kind.py", "adapters/prompts.py",
    "adapters/variants/base.py", "contrib/layer_wrappers/__init__.py", "data/formats/__init__.py",
    "export/__init__.py", "export/targets/__init__.py", "models/storages/__init__.py", "objectives/__init__.py",
    "objectives/rollout.py", "report/events.py", "report/reporters/__init__.py",
    "report/reporters/trackers/__init__.py",
    "serve/engine.py", "serve/engines/__init__.py", "settings.py", "train/optimizers/__init__.py",
]  # fmt: skip
PAGES = sorted(DOCS.glob("add-a*.md"))
ELSEWHERE = {
    "BnConfig": "AdapterHub's",
    "FORMS": "the tests'",
    "create_loraplus_optimizer": "PEFT's",
    "Module": "torch's",
}
"""Names of others that are only spoken of, and whose."""
PLAIN = (ast.expr_context, ast.operator, ast.Call, ast.Subscript, ast.Tuple, ast.Assign, ast.If, ast.Expr, ast.Return)
"""Most of a tree, and no definitions."""
FILES = (".py", ".md", ".json", ".jsonl", ".jinja", ".yaml")


@cache
def definitions() -> tuple[set[str], dict[str, list[set[str]]]]:
    """Every name that the package defines, its modules, and what its code has as a whole string; and the parameters of
    every function, or fields of every class, by name."""
    names, parameters = set(dir(builtins)), defaultdict(list)
    called: set[str] = set()  # fields that hold functions: their parameters have no names
    for path in PACKAGE.rglob("*.py"):
        names |= {path.stem, path.parent.name}
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, PLAIN):
                continue
            match node:
                case ast.FunctionDef(name=name, args=own) | ast.AsyncFunctionDef(name=name, args=own):
                    names.add(name)
                    parameters[name].append({each.arg for each in (*own.posonlyargs, *own.args, *own.kwonlyargs)})
                case ast.ClassDef(name=name, body=body):
                    names.add(name)
                    fields = [each for each in body if isinstance(each, ast.AnnAssign)]
                    given = {each.target.id: each.annotation for each in fields if isinstance(each.target, ast.Name)}
                    parameters[name].append(set(given))
                    called |= {key for key, own in given.items() if "Callable" in ast.unparse(own)}
                    starts = [each for each in body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
                    parameters[name] += [{each.arg for each in start.args.args} for start in starts]
                case ast.Constant(value=str(name)) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                    names.add(name)
                case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                    names.add(name)
                case ast.alias(name=name):  # of others: torch.optim.Optimizer
                    names |= set(name.split("."))
                case _:
                    pass
    return names, {name: own for name, own in parameters.items() if name not in called}


def quoted(text: str) -> Iterator[str]:
    """What of the backticks of a text is an identifier or a call."""
    for each in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        if re.fullmatch(r"[A-Za-z_][\w.]*(\([\w, .]*\))?", each) and not each.endswith(FILES):
            yield each


def unknown(text: str, code: str = "") -> list[str]:
    """What of it is not there. `code`: examples of the page itself, whose names it may use."""
    found = []
    names, parameters = definitions()
    its_own = set(re.findall(r"\w+", code))
    for each in quoted(text):
        name, call, given = each.partition("(")
        missing = [part for part in name.split(".") if part not in names | its_own | ELSEWHERE.keys()]
        if missing:
            found.append(f"{each}: no {', '.join(missing)}")
        last = name.rpartition(".")[2]
        given_names = {part.strip() for part in given.rstrip(")").split(",")} - {"", "..."}
        if call and last in parameters and not any(given_names <= own for own in parameters[last]):
            found.append(f"{each}: no {last} has these parameters")
    return found


@pytest.mark.parametrize("place", SEAMS)
def test_docstrings_of_seams_name_what_is_there(place: str) -> None:
    tree = ast.parse((PACKAGE / place).read_text("utf-8"))
    texts = [
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    assert unknown("\n".join(texts)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_name_what_is_there(page: Path) -> None:
    text = page.read_text("utf-8")
    examples = re.findall(r"```.*?```", text, re.DOTALL)
    assert unknown(re.sub(r"```.*?```", "", text, flags=re.DOTALL), "\n".join(examples)) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("`ask`, `publish` and `unpublish` may block", "ask: no ask"),
        ("whose `wrap(weight_OD, bias_O)` returns", "wrap(weight_OD, bias_O): no wrap has these parameters"),
        ("`Variant.applied`", "Variant.applied: no applied"),
    ],
)
def test_stale_sentences_are_found(text: str, problem: str) -> None:
    assert unknown(text) == [problem]
