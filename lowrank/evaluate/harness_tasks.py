"""Tasks of lm-eval: found by name, run on a model, and written as lm-eval writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from lowrank.checkpoints.atomic import write_text
from lowrank.errors import ConfigError, DataError, did_you_mean, raise_all
from lowrank.third_party import ALLOW_CODE_HINT, CodeRefused, code_is_allowed

RESULTS = "results.json"
_ALSO_CALLED = {"ceval": "ceval-valid"}
"""C-Eval keeps the answers of its test split to itself, so lm-eval's tasks of it are those of the other one."""


def names_of(tasks: str) -> list[str]:
    """lm-eval's names of tasks with commas between them, as a person writes them."""
    return [_ALSO_CALLED.get(name, name) for each in tasks.split(",") if (name := each.strip())]


def find_tasks(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """What knows the tasks, those in `include_path` too. ConfigError for names that it does not know."""
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--include-path: there is no folder {include_path}")
    if not names:
        raise ConfigError("--tasks: name at least one")
    if include_path is not None:
        _refuse_code(include_path)
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(own.match_tasks([name]) for name in names):
            return own  # reading lm-eval's own list takes seconds
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    known = list(manager.all_tasks)
    problems = [f"{name}{did_you_mean(name, known)}" for name in names if not manager.match_tasks([name])]
    raise_all(ConfigError, f"--tasks: lm-eval has {len(known)} tasks, these are not among them:", problems)
    return manager


def _refuse_code(folder: Path) -> None:
    """CodeRefused for task files that name Python functions, which lm-eval runs as it reads them."""
    if code_is_allowed():
        return
    for file in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
        if "!function" in file.read_text(encoding="utf-8", errors="replace"):
            raise CodeRefused(f"--include-path: {file} runs Python (!function); {ALLOW_CODE_HINT}")


def run_tasks(
    lm: LM,
    names: Sequence[str],
    manager: TaskManager,
    num_fewshot: int | None,
    limit: int | None,
    apply_chat_template: bool,
) -> dict[str, Any]:
    """lm-eval's results, samples among them. DataError where the data of a task cannot be had."""
    try:
        results = simple_evaluate(
            lm,
            tasks=[*manager.match_tasks(list(names))],
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    except (OSError, ConnectionError) as error:  # what `datasets` and the hub raise, offline too
        raise DataError(
            f"the data of a task cannot be had ({type(error).__name__}: {error}); connect to the hub once, or give "
            "task files with local data (--include-path)"
        ) from error
    assert results is not None, "there is one process"
    return dict(results)


def write_results(results: dict[str, Any], folder: Path) -> None:
    """`results.json` and `samples_<task>.jsonl`, with the contents of lm-eval's `--output_path --log_samples`."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = {name: value for name, value in results.items() if name != "samples"}
    text = json.dumps(rest, indent=2, default=handle_non_serializable, ensure_ascii=False)
    write_text(folder / RESULTS, text + "\n")
    for task, samples in results.get("samples", {}).items():
        lines = (json.dumps(each, default=handle_non_serializable, ensure_ascii=False) + "\n" for each in samples)
        write_text(folder / f"samples_{task}.jsonl", "".join(lines))
