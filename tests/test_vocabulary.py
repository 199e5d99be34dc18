"""Names are the field's terms: words of a private language stay out of identifiers (docs/glossary.md)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowrank

ROOT = Path(lowrank.__file__).parent.parent
TERMS = {
    "arguments, message": {"word", "words"},
    "requested, question": {"ask", "asked", "asking", "asks"},
    "report, notify": {"told", "tell", "tells", "telling"},
    "message, output": {"said", "say", "says"},
    "problem, error": {"trouble", "troubles"},
    "model": {"voice", "voices"},
    "on_event, hook": {"hear", "hears", "heard"},
    "dataloader": {"feed", "feeds"},
    "checkpointer": {"keeper"},
    "slot": {"seat", "seats"},
    "handler": {"desk"},
    "assign": {"deal", "deals", "dealt"},
    "row_counts, counts": {"tally", "tallies"},
    "run_command": {"obey", "obeys"},
    "is_reward_model": {"judges"},
    "supports_images": {"sees", "blind"},
    "media_encoder, audio_encoder": {"sight", "sighted", "hearing", "eyes", "ears"},
}
"""What to say instead, by the parts of names that are refused."""
BRITISH = re.compile(
    r"(?:quant|optim|initial|serial|token|normal|organ|recogn|summar|general|regular|vector|material|random|minim|maxim"
    r"|util|parallel|synchron|special|categor|character|final|priorit|emphas|custom|visual|local|memor|author)"
    r"is(?:e[drs]?|ers|ing|ation|ations)"
    r"|(?:col|behavi|neighb|fav|hon|lab|flav|harb|rum)our\w*|cent(?:re|red|res)|catalogues?|grey|licence|defence|artefacts?"
    r"|judgement|modell(?:ed|ing|er)|label(?:led|ling)|analyse[drs]?|programme"
)
"""Identifiers and file names are spelled the American way, as torch's and transformers' are."""
BIT_PACKING = ("kernels/bit_packing.py", "models/prequantized/", "tests/kernels/test_bit_packing.py")
"""Where a word is 32 bits."""
LANGUAGE_LISTS = ("examples/tiny-base/",)
"""Where a word is one of a language."""


def _parts(name: str) -> list[str]:
    return [part.lower() for part in re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+", name)]


def _defined(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that a file makes: not those of others that it uses (`study.ask`), and no sentence that names a test."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                if not name.startswith("test_"):
                    yield name, node.lineno
            case ast.arg(arg=name) | ast.alias(asname=str(name)):
                yield name, node.lineno
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno


def _private(name: str) -> str | None:
    """What to say instead of a part of the name."""
    parts = set(_parts(name))
    if "take_home" in name.lower():
        return "export"
    if british := next(filter(BRITISH.fullmatch, parts), None):
        return f"the American spelling of {british}"
    return next((instead for instead, refused in TERMS.items() if parts & refused), None)


@pytest.mark.parametrize("folder", ["lowrank", "tests", "benchmarks", "examples"])
def test_identifiers_are_the_field_s_terms(folder: str) -> None:
    found: list[str] = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        if "/vendor/" in place or any(part in place for part in (*BIT_PACKING, *LANGUAGE_LISTS)):
            continue
        names = [*_defined(ast.parse(path.read_text("utf-8"))), (path.stem, 1)]
        names = [(name, line) for name, line in names if not name.startswith("test_")]
        found += [f"{place}:{line}: {name} -> {_private(name)}" for name, line in names if _private(name)]
    folders = [path for path in (ROOT / folder).rglob("*") if path.is_dir() and "vendor" not in path.parts]
    found += [f"{path.relative_to(ROOT)}/ -> {_private(path.name)}" for path in folders if _private(path.name)]
    assert not found, "\n".join(found)


EMPTY_DOCSTRING = re.compile(r"(?:The (?:variant|objective|target|engine|optimizer|reason)|All of it|A reason)\.")
"""Docstrings that only say again what the name says."""


def test_docstrings_say_something() -> None:
    found: list[str] = []
    for path in sorted((ROOT / "lowrank").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                text = ast.get_docstring(node)
                if text is not None and EMPTY_DOCSTRING.fullmatch(text):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}: {text}")
    assert not found, "say what it returns, in which units, and what it raises:\n" + "\n".join(found)


def test_file_names_of_the_docs_are_spelled_alike() -> None:
    names = [path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*")]
    assert [str(name) for name in names if any(map(BRITISH.fullmatch, _parts(name.stem)))] == []


@pytest.mark.parametrize(
    ("name", "refused"),
    [("words", True), ("_said", True), ("AskedQuestion", True), ("take_home", True), ("password", False),
     ("keywords", False), ("task", False), ("embedding", False), ("assay", False),
     ("_hear", True), ("feeds", True), ("feedback", False),
     ("neighbours", True), ("quantised_outputs", True), ("ModellingHead", True), ("raised", False), ("modeling", False),
     ("noise_layerwise", False), ("hours_of_ours", False), ("centered", False)],
)  # fmt: skip
def test_only_whole_parts_of_names_are_refused(name: str, refused: bool) -> None:
    assert (_private(name) is not None) == refused


def test_no_two_public_classes_are_called_alike() -> None:
    """Whoever searches for a class finds one."""
    places: dict[str, list[str]] = {}
    for path in sorted((ROOT / "lowrank").rglob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
