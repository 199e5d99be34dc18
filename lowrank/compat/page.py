"""docs/llamafactory.md, written from the tables of keys: `python -m lowrank.compat.page > docs/llamafactory.md`."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank.compat.llamafactory import TEMPLATES
from lowrank.compat.llamafactory_keys import Keys
from lowrank.compat.llamafactory_method import OPTIMIZERS, SCHEDULES
from lowrank.compat.llamafactory_others import NO_EFFECT, REFUSED, Group

TOP = """\
# LLaMA-Factory files

<!-- Written by `python -m lowrank.compat.page > docs/llamafactory.md`; a test keeps it current. -->

A LLaMA-Factory (v0) training file runs as it is:

    lowrank train llama3_lora_sft.yaml
    lowrank train llama3_lora_sft.yaml lora_rank=16 output_dir=runs/r16     # its keys, or native ones
    lowrank show llama3_lora_sft.yaml > native.yaml                         # the native form

`dataset_info.json` is found through `dataset_dir`: from the current directory, as in LLaMA-Factory, then
from the folder of the file and the three folders above it. What a file leaves out has LLaMA-Factory's
default, not lowrank's (rank 8, learning rate 5e-5, linear schedule, batch size 8, ...).

A key that cannot be honoured is an error that names the way out. A key without effect is a warning if
its value asks for something. All of them are listed here.

## What is the same, and what is not

- The batch of a step is `per_device_train_batch_size` x `gradient_accumulation_steps` samples on one
  device. A file meant for n devices needs n times the accumulation.
- The loss of a step is a mean over all its tokens, as in transformers since 4.46.
- Rows are never padded, and packed documents never see each other, also with `packing: true`.
- `max_samples` and `num_samples` take rows chosen by the seed; LLaMA-Factory takes the first rows for
  `max_samples`. A dataset smaller than `num_samples` is not repeated.
- A too long sample keeps its prompt and loses the end of its answer; LLaMA-Factory cuts both. How many
  are cut is said before training. `stage: pt` loses no text: long documents are cut in pieces.
- `template` chooses the built-in chat template that reproduces it. Where there is none, the tokenizer's own
  is used and a warning says so; for a chat model that is the template its makers trained it with. The line
  break after the end of a turn is not learned, and BOS stands where the tokenizer puts it.
- A column that `columns` does not map is not used, as in LLaMA-Factory; so `system` and `history` of an
  alpaca file count only where they are mapped.
- Without `resume_from_checkpoint` and `overwrite_output_dir`, a run goes on from the last checkpoint in
  `output_dir`, as in LLaMA-Factory. Checkpoints of LLaMA-Factory itself cannot be continued; its
  adapters can (`adapter_name_or_path`).
- `epoch` strategies become shares of the run.
"""


def llamafactory_page() -> str:
    """The whole page, as markdown."""
    honoured = ["| key | default | becomes |", "| --- | --- | --- |"]
    for name, field in Keys.model_fields.items():
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        honoured.append(f"| `{name}` | {default} | {' '.join((field.description or '').split())} |")
    return "\n".join(
        [
            TOP,
            "## Honoured\n",
            *honoured,
            "",
            f"`template`: {_listed(TEMPLATES)}.\n",
            f"`optim`: {_listed(OPTIMIZERS)}. `lr_scheduler_type`: {_listed(SCHEDULES)}.\n",
            "## Refused\n\nUnless it has LLaMA-Factory's own default.\n",
            *_table(REFUSED, "way out"),
            "",
            "## Without effect, with a warning\n",
            *_table([group for group in NO_EFFECT if group.speaks], "why"),
            "",
            "## Without effect\n",
            *_table([group for group in NO_EFFECT if not group.speaks], "why"),
            "",
        ]
    )


def _table(groups: Sequence[Group], heading: str) -> list[str]:
    lines = [f"| keys | {heading} |", "| --- | --- |"]
    return lines + [f"| {_listed(group.keys)} | {group.why} |" for group in groups]


def _listed(names: Sequence[str] | dict[str, str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _shown(default: object) -> str:
    if default in (None, (), {}):
        return ""
    return f"`{','.join(map(str, default)) if isinstance(default, tuple) else default}`"


if __name__ == "__main__":
    print(llamafactory_page(), end="")
