"""Static check: which names and arguments Unsloth's notebooks use, and what this package makes of each.

python -m tests.compat.unsloth_notebooks FOLDER            check a folder of notebooks, name what would stop each
python -m tests.compat.unsloth_notebooks FOLDER --write    and write the facts file, which holds names and counts alone
python -m tests.compat.unsloth_notebooks --table           the table of docs/unsloth.md, from the facts file

A notebook is taken if it trains on text: it builds a trainer for a model of FastLanguageModel or FastModel, and its
name and imports speak of no pictures, no sound, no sentence embeddings. Code is parsed, not run. What stands under
`if False` is counted apart: it does not run, until somebody changes it.
"""

from __future__ import annotations

import ast
import inspect
import json
import logging
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

FACTS = Path(__file__).parent / "unsloth_facts.json"
_OTHERS = re.compile(r"Vision|Audio|TTS|OCR|_VL_|VL_GRPO|Whisper|Multimodal|BERT|Embedding|MiniLM|BGE")
_ROOTS = ("unsloth", "unsloth_zoo", "trl", "peft", "vllm")
_PARTS = ("model", "trainer", "tokenizer")
_WITH_VALUES = {
    "load_in_4bit", "load_in_8bit", "load_in_16bit", "load_in_fp8", "full_finetuning", "fast_inference", "qat_scheme",
    "offload_embedding", "device_map", "attn_implementation", "bias", "use_gradient_checkpointing", "use_rslora",
    "loftq_config", "finetune_vision_layers", "finetune_language_layers", "finetune_attention_modules", "optim",
    "finetune_mlp_modules", "task_type", "auto_model", "chat_template", "map_eos_token", "save_method", "packing",
    "quantization_method", "padding_free", "loss_type", "use_vllm", "lr_scheduler_type", "unsloth_force_compile",
    "unsloth_tiled_mlp", "float8_kv_cache", "num_labels", "id2label", "label2id", "importance_sampling_level",
}  # fmt: skip
"""Arguments of which the value, where it is written out, decides."""
ELSEWHERE = "<another value>"


@dataclass(frozen=True, order=True)
class Use:
    """One thing that a notebook needs: a name imported, a method called, an argument given (with its value)."""

    of: str
    """`import MODULE`, or what is called: `SFTTrainer`, `FastModel.from_pretrained`, `model.generate`."""
    name: str = ""
    value: str | None = None
    """Written as in Python; None where it does not matter."""
    runs: bool = True
    """False under `if False`."""


# --- reading ----------------------------------------------------------------------------------------------------------


def cells_of(path: Path) -> Iterator[str]:
    """The code of each cell, without what is the notebook's and not Python's."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        magic = re.match(r"\s*%%(\w+)", text)
        if cell["cell_type"] == "code" and (magic is None or magic[1] == "capture"):
            yield re.sub(r"^(\s*)[!%].*(?:\\\n.*)*", r"\1pass", text, flags=re.MULTILINE)


def trains_on_text(path: Path) -> bool:
    """Whether the check is for this notebook."""
    code = "\n".join(cells_of(path))
    return (
        re.search(r"\w*Trainer\(", code) is not None
        and re.search(r"\bFast(Language)?Model\.from_pretrained", code) is not None
        and not _OTHERS.search(path.name)
        and not re.search(r"^\s*(from|import) .*(Vision|SentenceTransformer|snac|whisper)", code, re.MULTILINE)
    )


def uses_of(path: Path) -> set[Use]:
    """All uses in a notebook; cells that are no Python by themselves (other tools' texts) are left out."""
    found: set[Use] = set()
    imported: set[str] = set()
    for cell in cells_of(path):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(cell)
        except SyntaxError:
            continue
        _walk(tree, True, imported, found)
    return found


def _walk(node: ast.AST, runs: bool, imported: set[str], found: set[Use]) -> None:
    if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in _ROOTS:
        for each in node.names:
            imported.add(each.asname or each.name)
            found.add(Use(f"import {node.module}", each.name, None, runs))
    if isinstance(node, ast.Call):
        found |= _call(node, runs, imported)
    for child in ast.iter_child_nodes(node):
        never = isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and node.test.value is False
        _walk(child, runs and not (never and child in node.body), imported, found)


def _call(node: ast.Call, runs: bool, imported: set[str]) -> set[Use]:
    called = node.func
    if isinstance(called, ast.Name) and (called.id in imported or called.id in ("Trainer", "TrainingArguments")):
        of = called.id
    elif isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and (
        called.value.id in imported or called.value.id in _PARTS
    ):  # fmt: skip
        of = f"{called.value.id}.{called.attr}"
    else:
        return set()
    found = {Use(of, "", None, runs)}
    for each in node.keywords:
        if each.arg is not None:
            value = _value(each.value) if each.arg in _WITH_VALUES else None
            found.add(Use(of, each.arg, value, runs))
    return found


def _value(node: ast.AST) -> str:
    try:
        return repr(ast.literal_eval(node))  # type: ignore[arg-type]
    except ValueError:
        if isinstance(node, ast.Name) and node.id[:1].isupper() and not node.id.isupper():
            return node.id
        return ELSEWHERE


# --- judging ----------------------------------------------------------------------------------------------------------


@cache
def problem(of: str, name: str, value: str | None) -> str | None:
    """Why a use would stop a notebook, in words; None if it is honored, or has no effect and says so."""
    from lowrank.errors import LowrankError

    if of.startswith("import "):
        return _import_problem(of.removeprefix("import "), name)
    owner, _, method = of.partition(".")
    try:
        if owner in ("FastLanguageModel", "FastModel"):
            return _front_problem(method, name, value)
        if owner == "model":
            return _model_problem(method, name, value)
        if owner in ("trainer", "tokenizer"):
            return None if hasattr(_kind(owner), method) else f"no such method of a {owner}"
        return _function_problem(of, name, value)
    except LowrankError as error:
        return str(error).splitlines()[-1].strip().removeprefix("- ")


def _kind(owner: str) -> Any:
    import transformers

    return transformers.Trainer if owner == "trainer" else transformers.PreTrainedTokenizerFast


def _import_problem(module: str, name: str) -> str | None:
    import importlib

    if module == "vllm":
        return None if name == "SamplingParams" else "there is no vLLM in here"
    own = re.sub(r"^unsloth\b", "lowrank.compat.unsloth", module)
    try:
        getattr(importlib.import_module(own), name)
    except (ImportError, AttributeError, RuntimeError) as error:
        return str(error)
    return None


def _front_problem(method: str, name: str, value: str | None) -> str | None:
    from lowrank.compat.unsloth import FastLanguageModel, arguments

    function = getattr(FastLanguageModel, method, None)
    if function is None:
        return "no such method"
    known = inspect.signature(function).parameters
    given = _evaluated(value)
    if not name:
        return None
    if name == "auto_model" and "CausalLM" not in str(value):
        return "only language models (...ForCausalLM) are loaded here"
    if name == "finetune_language_layers" and given is False:
        return "only the language model is trained here"
    if name == "device_map":
        arguments.device_of(given)
    if name in known:
        return None
    tables = {"from_pretrained": arguments.LOADING_ELSEWHERE, "get_peft_model": arguments.ADAPTER_ELSEWHERE}
    arguments.refuse(method, {name: given}, tables.get(method, {}))
    return None


def _evaluated(value: str | None) -> Any:
    try:
        return ast.literal_eval(value) if value is not None else ELSEWHERE
    except (ValueError, SyntaxError):
        return value


def _model_problem(method: str, name: str, value: str | None) -> str | None:
    import transformers

    from lowrank.compat.unsloth import saving
    from lowrank.compat.unsloth.model import TunedModel

    function = getattr(TunedModel, method, None)
    if function is None:
        return "no such method of a model"
    if method == "save_pretrained_torchao":
        return saving.NO_SUCH_METHOD["torchao"]
    given = _evaluated(value)
    if name == "save_method" and given not in ("merged_16bit", "merged_4bit", "merged_4bit_forced", "lora"):
        return saving.NO_SUCH_METHOD.get(str(given), "expected merged_16bit, merged_4bit or lora")
    if name == "quantization_method" and given != ELSEWHERE:
        for each in [given] if isinstance(given, str) else given:
            saving.check_gguf_type(each)
    if method == "generate" and name:
        inputs = ("streamer", "input_ids", "attention_mask", "stopping_criteria")
        return None if name in inputs or hasattr(transformers.GenerationConfig(), name) else "unknown to generate()"
    return None


def _function_problem(of: str, name: str, value: str | None) -> str | None:
    import transformers
    import trl

    import lowrank.compat.unsloth as front
    from lowrank.compat.unsloth import chat_templates, trl_arguments

    older = {*trl_arguments._RENAMED, *trl_arguments._KEPT, *trl_arguments._WITHOUT_EFFECT}
    if of == "UnslothTrainingArguments":
        own = inspect.signature(front.UnslothTrainingArguments.__init__).parameters
        return None if name in own else _function_problem("SFTConfig", name, value)
    if of == "UnslothTrainer":
        return _function_problem("SFTTrainer", name, value)
    if of.endswith(("Config", "TrainingArguments", "Trainer")) and not hasattr(front, of):
        kind = getattr(trl, of, None) or getattr(transformers, of)
        if not name:
            return None
        if of.endswith("Trainer"):
            config = getattr(
                sys.modules[kind.__module__], of.replace("Trainer", "Config"), transformers.TrainingArguments
            )
            known = {*inspect.signature(kind.__init__).parameters, "tokenizer", *(each.name for each in fields(config))}
        else:
            known = {each.name for each in fields(kind)}
        return None if name in known | older else f"{of} has no {name}"
    function = getattr(front, of, None)
    if function is None:
        return None  # its import was judged
    known = inspect.signature(function).parameters
    if of == "get_chat_template" and name == "chat_template" and value not in (None, ELSEWHERE):
        chosen = _evaluated(value)
        if isinstance(chosen, str) and chosen not in chat_templates.KINDS:
            return "no such template"
    open_ended = any(each.kind is each.VAR_KEYWORD for each in known.values())
    return None if not name or name in known or open_ended else f"{of} has no {name}"


# --- facts ------------------------------------------------------------------------------------------------------------


def to_facts(folder: Path, commit: str) -> dict[str, Any]:
    """Names, arguments, which notebooks (by number, as bits of a number): no code."""
    notebooks = sorted(path for path in folder.glob("*.ipynb") if trains_on_text(path))
    bits: dict[Use, int] = defaultdict(int)
    for number, path in enumerate(notebooks):
        for use in uses_of(path):
            bits[use] |= 1 << number
    rows = [[use.of, use.name, use.value, use.runs, f"{where:x}"] for use, where in sorted(bits.items(), key=_key)]
    return {"repository": "unslothai/notebooks", "commit": commit, "notebooks": len(notebooks), "uses": rows}


def _key(item: tuple[Use, int]) -> Any:
    return item[0].of, item[0].name, str(item[0].value), item[0].runs


def read_facts(path: Path = FACTS) -> tuple[int, dict[Use, int]]:
    """(number of notebooks, which use each use)."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    return facts["notebooks"], {Use(*row[:4]): int(row[4], 16) for row in facts["uses"]}


def stopped(bits: Mapping[Use, int], *, also_unrun: bool = False) -> dict[Use, str]:
    """The uses that stop a notebook, and why."""
    judged = {use: problem(use.of, use.name, use.value) for use in bits if use.runs or also_unrun}
    return {use: why for use, why in judged.items() if why is not None}


def passing(count: int, bits: Mapping[Use, int], *, also_unrun: bool = False) -> int:
    """Notebooks that nothing stops."""
    bad = 0
    for use in stopped(bits, also_unrun=also_unrun):
        bad |= bits[use]
    return count - bad.bit_count()


def table() -> str:
    """For docs/unsloth.md: each thing called or imported, its arguments, how many notebooks, what becomes of it."""
    count, bits = read_facts()
    of: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    refused: dict[str, dict[str, tuple[int, str]]] = defaultdict(dict)
    for use, where in bits.items():
        of[use.of][use.name] |= where
        why = problem(use.of, use.name, use.value)
        if why is not None:
            shown = use.name if use.value is None or use.value == ELSEWHERE else f"{use.name}={use.value}"
            before = refused[use.of].get(shown, (0, ""))[0]
            refused[use.of][shown] = (before | where, why)
    lines = ["| name | notebooks | arguments (notebooks) | refused, in these words |", "|---|---|---|---|"]
    for name in sorted(of, key=lambda each: (not each.startswith("import"), each)):
        everywhere = 0
        for where in of[name].values():
            everywhere |= where
        inner = sorted(
            ((key, where.bit_count()) for key, where in of[name].items() if key), key=lambda x: (-x[1], x[0])
        )
        bad = {key.partition("=")[0] for key in refused[name]}
        fine = ", ".join(f"`{key}` {number}" for key, number in inner if key not in bad or _also_fine(name, key, bits))
        labels = "; ".join(
            f"`{key or name}` {where.bit_count()}: {_plain(why)}" for key, (where, why) in sorted(refused[name].items())
        )
        lines.append(f"| `{name}` | {everywhere.bit_count()} | {fine} | {labels} |")
    done, all_cells = passing(count, bits), passing(count, bits, also_unrun=True)
    head = f"{done} of {count} notebooks pass; {all_cells}, if what stands under `if False` counts too.\n\n"
    return head + "\n".join(lines) + "\n"


def _also_fine(of: str, name: str, bits: Mapping[Use, int]) -> bool:
    """Some value of it is honored."""
    return any(use.of == of and use.name == name and problem(of, name, use.value) is None for use in bits)


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main(arguments: list[str]) -> int:
    """The command; its exit status."""
    logging.disable(logging.WARNING)
    if "--table" in arguments:
        print(table(), end="")
        return 0
    folder = Path(arguments[0])
    notebooks = sorted(path for path in folder.glob("*.ipynb") if trains_on_text(path))
    good = 0
    for path in notebooks:
        bad = sorted({(use.of, use.name, use.runs, why) for use, why in stopped(dict.fromkeys(uses_of(path), 1),
                      also_unrun=True).items()})  # fmt: skip
        good += not any(runs for _, _, runs, _ in bad)
        for of, name, runs, why in bad:
            print(f"{path.name}: {of}{' ' if name else ''}{name}{'' if runs else ' (under if False)'}: {why}")
    print(f"{good} of {len(notebooks)} notebooks pass")
    if "--write" in arguments:
        commit = arguments[arguments.index("--write") + 1] if arguments[-1] != "--write" else "unknown"
        rows = to_facts(folder, commit)
        lines = ",\n".join(json.dumps(row) for row in rows.pop("uses"))
        FACTS.write_text(json.dumps(rows)[:-1] + ', "uses": [\n' + lines + "\n]}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
