"""docs/api.md, out of the docstrings of what `import lowrank` offers: `python -m lowrank.api.page > docs/api.md`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterable
from typing import Any

import lowrank
from lowrank.api.signatures import Origin, alias, fields, property_of, signature, types_in
from lowrank.config.page import settings_table

_HEAD = """# In Python

What `import lowrank` offers, generated from its docstrings (`python -m lowrank.api.page > docs/api.md`). Settings are
those of [settings.md](settings.md). Nothing here prints, or changes the process it is called in: what a person should
know goes to the logger `lowrank`, and to reporters that you pass. A callback, as other trainers call it, is such a
reporter: it is called with every event of the run, and ends the run by `lowrank.LiveRun("runs/first").end()`.

`lowrank.train`, `evaluate`, `generate`, `export` and `serve` are functions beside packages of the same names. What lies
in a package is imported by `from lowrank.serve.engines import AUTO`: after `import lowrank.serve.engines`, programs run
as before, but a type checker takes `lowrank.serve` for the package and says that it cannot be called.

```python
import lowrank

rows = [{"prompt": "Who are you?", "completion": "A small model."}]
run = lowrank.train(model="lowrank/tiny", data=rows, output_dir="runs/first", max_steps=20)
run.metrics()  # a DataFrame; in a notebook, train shows a live table and curve
run.load().generate("Who are you?")
run.export("merged", "first-merged")
run.resume(max_steps=40)  # on another day: lowrank.TrainedRun("runs/first").resume(objects=[rows], max_steps=40)
```

With an objective, a reward function and a reporter of your own ([add-an-objective.md](add-an-objective.md) says more
of the first):

```python
import lowrank


class Focal:  # tokens that the model knows already weigh less
    record = lowrank.Conversation  # what it learns from: also Text, Preference, Rated, Prompted

    def count(self, batch):  # of all micro-batches of a step, added up: what the loss is divided by
        return {"tokens": float(batch.weight_T.sum())}

    def loss(self, scores, batch, totals):  # of one micro-batch: its share of the loss, and numbers to log
        surprise_T = (1 - scores.logprob_T.exp()) ** 2 * scores.logprob_T
        return -(batch.weight_T * surprise_T).sum() / max(totals["tokens"], 1e-9), {}


def short(completions, label, **columns):  # lists with an item for each answer
    return [-abs(len(own[-1]["content"]) - len(known)) for own, known in zip(completions, label)]


def report(event):  # a function, or an object with report(event) and close()
    if isinstance(event, lowrank.StepDone):
        print(event.job, event.step, event.loss)


rows = [{"prompt": f"What is {n}?", "completion": f"A number, {n}."} for n in range(16)]
jobs = [
    {"name": "focal", "objective": Focal()},
    {"name": "grpo", "objective": {"type": "grpo", "reward_funcs": [short], "max_completion_length": 16}},
]
run = lowrank.train(model="lowrank/tiny", data=rows, jobs=jobs, reporters=[report], output_dir="runs/own", max_steps=2)
run.load().generate("What is 3?", adapter="focal", max_new_tokens=16, temperature=0.7)
run.export("merged", "merged-model", adapters="focal", dtype="float32")  # read back, and compared with what was trained
lowrank.load("merged-model").generate("What is 3?")
```
"""

_SETTINGS = """## The settings to begin with

As keywords of `lowrank.train`, a dot for a dict: `optimizer.learning_rate` is `optimizer={"learning_rate": 1e-4}`. All
of them are in [settings.md](settings.md), which says too what may differ from job to job.
"""
_FIRST_SETTINGS = (
    "model.path", "data.batch_size", "data.max_length", "adapter.rank", "adapter.alpha", "adapter.target_modules",
    "optimizer.learning_rate", "schedule.warmup_ratio", "num_train_epochs", "max_steps", "eval_steps", "save_steps",
    "logging_steps", "seed",
)  # fmt: skip
_SEAMS = "Seams: what is your own"
_GROUPS = {
    "Functions": ("train", "load", "generate", "evaluate", "export", "serve"),
    "What they return": ("TrainedRun", "LiveRun", "Model", "RunningServer"),
    "Data": ("rows", "Conversation", "Message", "Text", "Preference", "Rated", "Prompted"),
    "Settings": ("RunConfig", "JobConfig", "GenerationConfig", "Settings", "code_allowed"),
    "Events": (
        "Reporter", "Event", "RunStarted", "JobStarted", "Preparing", "Stage", "Notice", "StepDone", "EvalDone",
        "CheckpointSaved", "JobMoved", "JobFinished", "RunFinished",
    ),
    _SEAMS: ("Objective", "Batch", "Scores", "Variant", "ExportTarget", "ServeEngine"),
    "Errors": ("LowrankError", "ConfigError", "DataError", "ModelError", "OutputError", "NotTheSameError"),
}  # fmt: skip
_BESIDE_VARIANT = [("lowrank.adapters.variants.base", name) for name in ("SiteSetup", "OutputGain", "BiasMerge")]
_IN_TEXTS = [("lowrank.objectives", "Need"), ("lowrank.serve.api.http_errors", "ApiError")]
"""Named by docstrings only."""
_WITHOUT_FIELDS = ("lowrank.config.schema", "lowrank.pipelines", "lowrank.models")
"""Rooms whose classes are shown by what they are alone: the settings page has the first one's fields."""


def api_page() -> str:
    """The page as Markdown: the functions first, then the rest in groups, then the types that all these name."""
    listed = [name for names in _GROUPS.values() for name in names]
    assert sorted([*listed, "__version__"]) == sorted(lowrank.__all__), "each name stands in one group"
    parts, named = [_HEAD, _settings()], [*_BESIDE_VARIANT, *_IN_TEXTS]
    for group, names in _GROUPS.items():
        parts.append(f"## {group}\n")
        for name in names:
            parts.append(_entry(f"lowrank.{name}", _origin_of(name), named, members=group == _SEAMS))
    parts.append("## Types named above\n")
    seen = {_origin_of(name) for name in listed}
    for origin in named:  # which grows as entries name more
        if origin not in seen:
            seen.add(origin)
            parts.append(_entry(origin[1], origin, named))
    return "\n".join(parts).rstrip() + "\n"


def _settings() -> str:
    return f"{_SETTINGS}\n{settings_table(_FIRST_SETTINGS)}"


def _origin_of(name: str) -> Origin:
    """Where what `import lowrank` offers is defined."""
    thing = getattr(importlib.import_module(lowrank.OFFERED[name]), name)
    is_named = isinstance(thing, type) or inspect.isfunction(thing)
    return (thing.__module__, thing.__name__) if is_named else (lowrank.OFFERED[name], name)


def _entry(title: str, origin: Origin, named: list[Origin], *, members: bool = False) -> str:
    """A function, a class or an alias; the types that it names are added to `named`."""
    thing = getattr(importlib.import_module(origin[0]), origin[1])
    heading = f"### {title}\n"
    if not title.startswith("lowrank."):
        heading += f"\n`from {origin[0]} import {origin[1]}`\n"
    if inspect.isfunction(thing):
        _name_types(thing, named)
        return f"{heading}\n{_fenced(signature(title, thing), '', inspect.getdoc(thing))}\n"
    if isinstance(thing, type) and thing.__name__ == origin[1]:
        return f"{heading}\n{_class(title, thing, named, members=members)}"
    text, meaning = alias(origin)
    named += types_in(text.partition(" = ")[2], origin[0])
    return f"{heading}\n{_fenced(text, *([''] if meaning else []), meaning)}\n"


def _class(title: str, kind: type, named: list[Origin], *, members: bool) -> str:
    """Its docstring and fields, and the members that a person calls or writes: of our classes, and of the seams."""
    own, name = list(fields(kind)), title.rpartition(".")[2]
    members = members or getattr(kind, "_is_protocol", False) or kind.__module__.startswith("lowrank.api.")
    members = (members and not _is_data(kind)) or (kind.__module__, kind.__name__) in _BESIDE_VARIANT
    maker: list[str] = []
    if members and _is_made(kind):
        maker = [signature(title, kind.__init__, own=True), *([str(inspect.getdoc(kind.__init__))]), ""]
        _name_types(kind.__init__, named)
    parts = [f"{_fenced(*maker, inspect.getdoc(kind), *_data_fields(kind, own))}\n"]
    if not members and not _is_data(kind):
        return parts[0]
    for field, _ in own:
        named += types_in(field.partition(": ")[2].partition(" = ")[0], kind.__module__)
    if not members:
        return parts[0]
    parts += [f"#### {name}.{field.partition(':')[0]}\n\n{_fenced(field, '', text)}\n" for field, text in own]
    for member, value in vars(kind).items():
        if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            is_property = isinstance(value, property)
            line = property_of(member, value) if is_property else signature(member, value, own=True)
            _name_types(value.fget if is_property else value, named)
            parts.append(f"#### {name}.{member}\n\n{_fenced(line, '', inspect.getdoc(value))}\n")
    return "\n".join(parts)


def _is_made(kind: type) -> bool:
    """Whether a person makes one: its `__init__` is its own, and documented."""
    made = vars(kind).get("__init__")
    return bool(made and made.__doc__) and not getattr(kind, "_is_protocol", False)


def _is_data(kind: type) -> bool:
    """Whether its fields are what there is to show of it."""
    has_fields = dataclasses.is_dataclass(kind) or "model_fields" in dir(kind)
    return has_fields and not kind.__module__.startswith(_WITHOUT_FIELDS)


def _name_types(function: Any, named: list[Origin]) -> None:
    found = inspect.signature(function)
    for annotation in (*(each.annotation for each in found.parameters.values()), found.return_annotation):
        if isinstance(annotation, str):
            named += types_in(annotation, function.__module__)


def _data_fields(kind: type, own: Iterable[tuple[str, str]]) -> list[str]:
    """`name: type = default`, and what the string below it says; none where the class's own text has them."""
    if not _is_data(kind):
        return []
    text = inspect.getdoc(kind) or ""
    if any(re.search(rf"^{field.partition(':')[0]}\b", text, re.MULTILINE) for field, _ in own):
        return []
    return ["", *(f"{field}    {' '.join(meaning.split())}".rstrip() for field, meaning in own)]


def _fenced(*lines: str | None) -> str:
    text = "\n".join(line for line in lines if line is not None).strip("\n")
    return f"```text\n{text}\n```"


if __name__ == "__main__":
    sys.stdout.write(api_page())
