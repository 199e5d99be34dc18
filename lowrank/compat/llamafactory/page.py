"""docs/llamafactory.md, written from the tables of keys.

python -m lowrank.compat.llamafactory.page > docs/llamafactory.md
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lowrank.compat.llamafactory.keys import Keys
from lowrank.compat.llamafactory.method import OPTIMIZERS, SCHEDULES
from lowrank.compat.llamafactory.other_keys import NO_EFFECT, REFUSED, Group
from lowrank.compat.llamafactory.templates import TEMPLATES
from lowrank.data.templates import slots

EXAMPLES = Path(__file__).parent / "examples.json"

TOP = """\
# LLaMA-Factory files

<!-- Written by `python -m lowrank.compat.llamafactory.page > docs/llamafactory.md`; a test keeps it current. -->

A LLaMA-Factory file runs as it is, and so do its flags:

    lowrank train llama3_lora_sft.yaml
    lowrank train --stage sft --do_train --model_name_or_path Qwen/Qwen3-4B --dataset identity ...
    lowrank chat qwen3_lora_sft.yaml        # a file for inference; also serve
    lowrank export qwen3_merge.yaml         # a file with export_dir
    lowrank predict llama3_predict.yaml     # a file with do_predict; `lowrank train` takes it too, as there
    lowrank eval llama3_mmlu.yaml           # an older file with `task`
    lowrank train llama3_lora_sft.yaml lora_rank=16 output_dir=runs/r16     # its keys, or native ones
    lowrank show llama3_lora_sft.yaml > native.yaml                         # the native form

`dataset_info.json` is found through `dataset_dir`: from the current directory, as in LLaMA-Factory, then
from the folder of the file and the three folders above it. What a file leaves out has LLaMA-Factory's
default, not lowrank's (rank 8, learning rate 5e-5, linear schedule, batch size 8, ...).

What a file of another kind than training stands for is said as a command: `qwen3_lora_sft.yaml is read as: lowrank chat
saves/qwen3 --base Qwen/Qwen3-4B --temperature 0.95 ...`. `do_predict` and `push_to_hub` beside `do_train` follow where
training has succeeded. Files of V1 (`model`, `peft_config`, `train_dataset`) are read where they say what V0's say.
`api`, `webchat`, `webui`, `env` and `version` are answered with the command here.

A key that cannot be honored is an error that names the way out. A key without effect is a warning if
its value asks for something. All of them are listed here.

## What is the same, and what is not

- The batch of a step is `per_device_train_batch_size` x `gradient_accumulation_steps` samples on one
  device. A file meant for n devices needs n times the accumulation.
- The loss of a step is a mean over all its tokens, as in transformers since 4.46.
- Rows are never padded, and packed documents never see each other, also with `packing: true`.
- PaliGemma reads whole prompts both ways, as it was pretrained, and the answer from left to right. LLaMA-Factory says
  so of the pictures alone, and has the question read from left to right.
- `max_samples` and `num_samples` take rows chosen by the seed; LLaMA-Factory takes the first rows for
  `max_samples`. A dataset smaller than `num_samples` is not repeated.
- A prompt that alone fills `cutoff_len` is cut and kept there, without an answer to learn; here the row is left out,
  and said to be.
- A too long sample keeps its prompt and loses the end of its answer; LLaMA-Factory cuts both. How many
  are cut is said before training. `stage: pt` loses no text: long documents are cut in pieces.
- `template`: all names of its registry are known, another is refused. A name stands for the built-in chat template that
  reproduces it, or for the tokenizer's own where that writes the same (compared on a short conversation; an empty
  thought counts as none). Where the two differ, the tokenizer's own is used, since it is the one the model was trained
  with, and a warning says what differs and how to have theirs: `data.chat_template=llamafactory/NAME`, which is also
  what a tokenizer without a template gets. `default`, `vicuna` and the others that there replace the tokenizer's
  template do so here. The line break after the end of a turn is not learned, and BOS is put by the tokenizer.
- A column that `columns` does not map is not used, as in LLaMA-Factory; so `system` and `history` of an
  alpaca file count only where they are mapped. The doctor names them all the same, and `--strict` refuses them.
- A `file_name` that is a folder is read whole, as in LLaMA-Factory, whatever its files are called; so are folders
  below it. `subset`, `folder` and keys that mean nothing here (`file_sha1`) are named and change nothing.
- Without `resume_from_checkpoint` and `overwrite_output_dir`, a run goes on from the last checkpoint in
  `output_dir`, as in LLaMA-Factory. Checkpoints of LLaMA-Factory itself cannot be continued; its
  adapters can (`adapter_name_or_path`).
- `epoch` strategies become shares of the run.
- `USE_MODELSCOPE_HUB=1` makes names those of ModelScope's hub (`pip install 'lowrank-llm[modelscope]'`); a dataset's
  `ms_hub_url` is read then, or where no other place is named. `dataset_dir: REMOTE:owner/name` is downloaded from
  Hugging Face.
- `split: train[:100]` in dataset_info.json takes those rows of local files, too.
- `pref_bco_weight`: the mean that rewards are compared with is over optimizer steps, there over forward passes; it
  begins anew when a run goes on. `moe_aux_loss_coef` is a mean over forward passes on either side.
- `use_asft_loss` with finetuning_type full or freeze, and `ref_model`, load a second model, as there.
"""


def llamafactory_page() -> str:
    """The whole page, as markdown."""
    honored = ["| key | default | becomes |", "| --- | --- | --- |"]
    for name, field in Keys.model_fields.items():
        default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
        honored.append(f"| `{name}` | {default} | {' '.join((field.description or '').split())} |")
    return "\n".join(
        [
            TOP,
            *_examples(),
            "## Honored\n",
            *honored,
            "",
            f"`template`: built in are {_listed(TEMPLATES)}; written by slots, as `llamafactory/NAME`, are "
            f"{_listed([name for name in slots.registry() if slots.can_be_written(name)])}.\n",
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


def _examples() -> list[str]:
    """Every file of its examples/ folder, and what becomes of it here."""
    known: dict[str, tuple[str, str]] = json.loads(EXAMPLES.read_text(encoding="utf-8"))
    labels = {"none": "nothing to run", "refused": "refused"}
    lines = ["| file | here |", "| --- | --- |"]
    for path, (state, why) in known.items():
        label = labels.get(state, f"runs: `lowrank {state}`")
        lines.append(f"| `{path}` | {f'{label}: {why}' if state in labels else f'{label}; {why}' if why else label} |")
    runs = sum(state not in labels for state, _ in known.values())
    refused = sum(state == "refused" for state, _ in known.values())
    return [
        "## Its examples\n",
        f"Of the files of its `examples/` folder (0.9.6, August 2026) {runs} run with only their paths changed, "
        f"{refused} are refused, and {len(known) - runs - refused} are no files of settings.\n",
        *lines,
        "",
    ]


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
