"""docs/api.md, out of the docstrings of what `import lowrank` offers: `python -m lowrank.api.page > docs/api.md`."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import lowrank

_HEAD = """# In Python

What `import lowrank` offers, generated from its docstrings (`python -m lowrank.api.page > docs/api.md`). Settings are
those of [settings.md](settings.md). Nothing here prints, or changes the process it is called in: what a person should
know goes to the logger `lowrank`, and to reporters that you pass.

```python
import lowrank

rows = [{"prompt": "Who are you?", "completion": "A small model."}]
run = lowrank.train(model="lowrank/tiny", data=rows, output_dir="runs/first", max_steps=20)
run.metrics()  # a DataFrame; in a notebook, train shows a live table and curve
run.load().generate("Who are you?")
run.export("merged", "merged-model")
run.resume(max_steps=40)
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

_ON_THE_SETTINGS_PAGE = "lowrank.config.schema"


def api_page() -> str:
    """The page as Markdown: functions first, then classes."""
    things = [(name, _thing(name)) for name in lowrank.__all__ if name != "__version__"]
    functions = [_function(name, thing) for name, thing in things if not isinstance(thing, type)]
    classes = [_class(name, thing) for name, thing in things if isinstance(thing, type)]
    return "\n".join([_HEAD, "## Functions\n", *functions, "## Classes\n", *classes]).rstrip() + "\n"


def _thing(name: str) -> Any:
    module, _, there = lowrank.OFFERED[name].partition(":")
    return getattr(importlib.import_module(module), there or name)


def _function(name: str, function: Any) -> str:
    return f"### lowrank.{name}({', '.join(_parameters(function))})\n\n{_fenced(function)}\n"


def _parameter(each: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(each.kind, "")
    return f"{stars}{each.name}" if each.default is inspect.Parameter.empty else f"{each.name}=..."


def _class(name: str, kind: type) -> str:
    """Its docstring and fields, and the members that a person calls or writes: of our classes, and of the seams."""
    parts = [f"### lowrank.{name}\n\n{_fenced(kind, _data_fields(kind))}\n"]
    if _is_protocol(kind):
        parts += [f"#### {name}.{field}\n\n```text\n{text}\n```\n" for field, text in _fields(kind)]
    if _is_protocol(kind) or kind.__module__.startswith("lowrank.api."):
        for member, value in vars(kind).items():
            if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                parts.append(f"#### {name}.{member}{_call(value)}\n\n{_fenced(value)}\n")
    return "\n".join(parts)


def _call(member: Any) -> str:
    """`(batch) -> Totals`; of a property, what it gives."""
    signature = inspect.signature(getattr(member, "fget", member))
    given = ", ".join(_parameter(each) for each in signature.parameters.values() if each.name != "self")
    kind = signature.return_annotation
    gives = f" -> {kind}" if kind not in (inspect.Signature.empty, "None", None) else ""
    return gives.replace(" ->", ":", 1) if isinstance(member, property) else f"({given}){gives}"


def _data_fields(kind: type) -> list[str]:
    """`name: type`, and what the string below it says; none where the class's own text has them."""
    is_data = dataclasses.is_dataclass(kind) or "model_fields" in dir(kind)
    if not is_data or kind.__module__ == _ON_THE_SETTINGS_PAGE:
        return []
    fields, text = list(_fields(kind)), inspect.getdoc(kind) or ""
    if any(re.search(rf"^{field.partition(':')[0]}\b", text, re.MULTILINE) for field, _ in fields):
        return []
    return ["", *(f"{field}    {' '.join(text.split())}".rstrip() for field, text in fields)]


def _is_protocol(kind: type) -> bool:
    return getattr(kind, "_is_protocol", False)


def _parameters(function: Any) -> list[str]:
    return (
        []
        if isinstance(function, property)
        else [_parameter(p) for p in inspect.signature(function).parameters.values()]
    )


def _fields(kind: type) -> Iterator[tuple[str, str]]:
    """Annotated attributes, `name: type`, each with the string that stands below it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    for statement, after in zip(body.body, [*body.body[1:], None]):
        if isinstance(statement, ast.AnnAssign):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
            text = inspect.cleandoc(documented) if isinstance(documented, str) else ""
            yield f"{ast.unparse(statement.target)}: {_plain(statement.annotation)}", text


def _plain(annotation: ast.expr) -> str:
    """Without the limits that `Annotated` adds."""
    if isinstance(annotation, ast.BinOp):
        return f"{_plain(annotation.left)} | {_plain(annotation.right)}"
    limited = isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated"
    return ast.unparse(annotation.slice.elts[0] if limited else annotation)  # type: ignore[attr-defined, union-attr]


def _fenced(thing: Any, more: Iterable[str] = ()) -> str:
    text = "\n".join([inspect.getdoc(thing) or "", *more])
    return f"```text\n{text}\n```"


if __name__ == "__main__":
    sys.stdout.write(api_page())
