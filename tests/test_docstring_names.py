"""Docstrings name what is there: a class or function in backticks that was renamed since leads its reader astray.

A backticked name passes if its parts are identifiers somewhere in the package, or in short strings of it;
`module.Name` of one of our modules must be in that module, and `Name` (file.py) in that file. Errors are looked up even
without backticks. tests/test_seam_names.py is stricter with the seams: there also parameters must be right.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import lowrank

PACKAGE = Path(lowrank.__file__).parent
OTHERS = {
    "BnConfig": "AdapterHub's",
    "PrefixEncoder": "PEFT's",
    "add_weighted_adapter": "PEFT's, of LoraModel",
    "create_loraplus_optimizer": "PEFT's",
    "replace_lora_weights_loftq": "PEFT's",
    "GradScaler": "torch's",
    "ATEN_CPU_CAPABILITY": "torch's, in the environment",
    "HfArgumentParser": "transformers'",
    "chat_template_utils": "transformers'",
    "render_jinja_template": "transformers'",
    "get_image_features": "transformers' models'",
    "image_grid_thw": "transformers' processors'",
    "input_layernorm": "transformers' models'",
    "self_attn": "transformers' models'",
    "proportional": "Gemma 4's",
    "data_collator": "transformers' Trainer's",
    "from_generator": "Hugging Face datasets'",
    "context_size": "other trainers'",
    "exllama": "AutoAWQ's",
    "gemv": "AutoAWQ's",
    "gemv_fast": "AutoAWQ's",
    "marlin": "AutoAWQ's",
    "preprocess_weights_for_mixed_gemm": "EETQ's",
    "symmetric_quantize": "EETQ's",
    "bitsandbytes__nf4": "bitsandbytes'",
    "use_attribute_docstrings": "Pydantic's",
    "LoraModel": "PEFT's",
    "SamplingParams": "vLLM's",
    "PromptEncoder": "PEFT's",
    "Formatter": "Python's, of string",
    "http_protocol_class": "uvicorn's",
}
"""Names of others that are only spoken of, and whose."""
FILE_NAME = re.compile(r"\.(?:py|md|jsonl?|jinja|ya?ml|toml|txt|html|css|js|safetensors|gguf|cpp|h)$")
IN_FILE = re.compile(r"`([A-Za-z_]\w*)` \((?:[\w/]+/)?(\w+)\.py\)")
ERROR = re.compile(r"(?<![\w.])[A-Z]\w*(?:Error|Exception)\b")


class Docstring(NamedTuple):
    """Of a module, class, function or attribute of the package, with its file from the package's folder on."""

    file: str
    line: int
    text: str


@cache
def read_package() -> tuple[list[Docstring], dict[str, set[str]], set[str]]:
    """(its docstrings, the identifiers of its modules by their short names, all that a name may be)."""
    docstrings: list[Docstring] = []
    modules: defaultdict[str, set[str]] = defaultdict(set)
    names = set(dir(builtins)) | OTHERS.keys()
    for path in sorted(PACKAGE.rglob("*.py")):
        stem = path.parent.name if path.name == "__init__.py" else path.stem
        modules[stem].update(each.stem for each in path.parent.iterdir() if path.name == "__init__.py")
        names.add(path.parent.name)
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        own = {node.value for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            match node:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    docstrings.append(Docstring(path.relative_to(PACKAGE).as_posix(), node.lineno, text))
                case ast.Constant(value=str(text)) if len(text) < 60 and node not in own:
                    names.update(re.findall(r"\w+", text))
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    modules[stem].add(name)
                case ast.Name(id=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)) | ast.Attribute(attr=name):
                    modules[stem].add(name)
                case ast.ImportFrom(module=str(name)):
                    names.update(name.split("."))
                case ast.alias(name=name, asname=asname):
                    names.update(name.split("."))
                    modules[stem].add(asname or name.rpartition(".")[2])
                case _:
                    pass
    return docstrings, dict(modules), names.union(modules, *modules.values())


def unknown(text: str) -> Iterator[str]:
    """What of a docstring is not there."""
    _, modules, names = read_package()
    for name in re.findall(r"(?<!`)`([A-Za-z_][\w.]*)(?:\([^`\n]*\))?`(?!`)", text):
        if FILE_NAME.search(name):
            continue
        parts = [part for part in name.split(".") if part]
        missing = [part for part in parts if part not in names and not name.endswith("...")]
        module, *rest = parts[-2:]
        if rest and rest[0][0].isupper() and rest[0] not in modules.get(module, names) | OTHERS.keys():
            missing.append(f"{rest[0]} in {module}")
        if missing:
            yield f"{name}: no {', '.join(missing)}"
    for name, module in IN_FILE.findall(text):
        if name not in modules.get(module, ()):
            yield f"{name}: no {name} in {module}.py"
    for name in ERROR.findall(text):
        if name not in names:
            yield f"{name}: no {name}"


def test_docstrings_name_what_is_there() -> None:
    found = [f"{file}:{line}: {each}" for file, line, text in read_package()[0] for each in unknown(text)]
    assert not found, "a name that was renamed, or of others (then add it to OTHERS):\n" + "\n".join(found)


def test_names_of_others_are_still_spoken_of() -> None:
    text = "\n".join(each.text for each in read_package()[0])
    assert [name for name in OTHERS if not re.search(rf"\b{name}\b", text)] == []


def test_stale_names_are_found() -> None:
    assert list(unknown("`GoneClass` and `Base`")) == ["GoneClass: no GoneClass"]
    assert list(unknown("`attention.packed.InGraph`, `paged.InGraph`")) == [
        "attention.packed.InGraph: no InGraph in packed"
    ]
    assert list(unknown("A `ServeEngine` (engine.py), `Reader` (engine.py)"))[-1] == "Reader: no Reader in engine.py"
    assert list(unknown("ConfigError for an unknown name, and OddError")) == [
        "OddError: no OddError",
    ]
