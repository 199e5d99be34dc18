"""lowrank against TRL + PEFT on conversations with pictures: tokens per second and memory on the same rows.

    python -m benchmarks.pictures --data mllm_demo.json [--steps 6] [--rounds 2] [--json FILE]

A LLaVA with random weights: the text model of Qwen2.5-0.5B with fewer layers, the tower of CLIP-ViT-B/16 with fewer.
Both sides read the rows and their pictures themselves, in the same order and steps, with LoRA of rank 16 on all linears
of the text model and the loss on answers alone; each in its own process, in turns. A step is timed from the end of the
one before, so decoding and preprocessing count. `trl_default` is SFTConfig's own settings (activation checkpointing),
`trl_plain` the same without it. The first step of each run is not counted; losses of the first step must agree.

`--cache EPOCHS` measures `model.cache_vision_features` instead: lowrank with it (an empty cache each time) and
without, in turns, over so many epochs of `--steps` steps in which every row has a picture of its own. The first epoch
writes what the others read. The losses of all steps must be equal, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, peak_memory

RANK, LEARNING_RATE = 16, 2e-4
CONTENDERS = ("lowrank", "trl_default", "trl_plain")
IMAGE = "<image>"
TEMPLATE = """\
{%- macro text(message) -%}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{{ '<image>' if part['type'] == 'image' else part['text'] }}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['role'] == 'assistant' %}{% generation %}{{ text(message) }}<|im_end|>{% endgeneration %}
{% else %}{{ text(message) }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def make_model(folder: Path, options: argparse.Namespace) -> None:
    """The checkpoint that both sides load, with its processor."""
    import transformers
    from tokenizers import AddedToken

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained("lowrank/models/tiny")
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    tower = transformers.CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=options.tower_layers, num_attention_heads=12,
        image_size=224, patch_size=16,
    )  # fmt: skip
    text = transformers.Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=options.layers, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=196, vision_feature_layer=-2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).to(getattr(torch, options.dtype))
    model.save_pretrained(folder)
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    transformers.LlavaProcessor(
        images, tokenizer, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token=IMAGE, chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip


def read_rows(data: Path, count: int) -> list[dict[str, Any]]:
    """The file's rows, over and over, with whole paths."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    made = [{**row, "images": [str(data.parent / place) for place in row["images"]]} for row in rows]
    return [made[number % len(made)] for number in range(count)]


def with_own_pictures(rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The rows, each with pictures that no other has: a little brighter from row to row."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number, row in enumerate(rows):
        places = [str(folder / f"{number}-{index}.png") for index in range(len(row["images"]))]
        for index, (place, to) in enumerate(zip(row["images"], places)):
            with Image.open(place) as picture:
                shift = 2 * number + index
                picture.convert("RGB").point(lambda value, shift=shift: min(255, value + shift)).save(to)
        made.append({**row, "images": places})
    return made


def lowrank(options: argparse.Namespace) -> dict[str, Any]:
    import lowrank
    from lowrank.report.events import Notice, StepDone

    ends, losses, tokens = [time.perf_counter()], [], []
    processor, entries = [time.process_time()], list[str]()

    def on_event(event: Any) -> None:
        if isinstance(event, StepDone):
            ends.append(time.perf_counter())
            processor.append(time.process_time())
            losses.append(event.loss)
            tokens.append(event.tokens)
        elif isinstance(event, Notice) and event.text.startswith("cached vision features: "):
            entries.append(event.text)

    rows = read_rows(options.data, options.steps * options.rows)
    media_dir = options.data.parent
    if options.cache:
        media_dir = options.folder / "pictures"
        rows = with_own_pictures(rows, media_dir)
    cached = options.contender == "cached"
    lowrank.train(
        model={"path": str(options.folder / "model"), "dtype": options.dtype, "cache_vision_features": cached},
        data={"train": [{"rows": rows, "media_dir": str(media_dir)}], "batch_size": options.rows, "shuffle": False},
        adapter={"rank": RANK},
        optimizer={"learning_rate": LEARNING_RATE},
        schedule={"type": "constant"},
        max_steps=options.steps * (options.cache or 1),
        output_dir=str(options.folder / f"run-{time.time_ns()}"),
        reporters=[on_event],
        save_steps=None,
        eval_steps=None,
    )
    return {"ends": ends, "processor": processor, "losses": losses, "tokens": tokens, "entries": entries}


def trl(options: argparse.Namespace) -> dict[str, Any]:
    import datasets
    import transformers
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = read_rows(options.data, options.steps * options.rows)
    table = datasets.Dataset.from_list([{"messages": in_parts(row), "images": row["images"]} for row in rows])
    table = table.cast_column("images", datasets.Sequence(datasets.Image()))
    ends, losses = [], []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    bf16 = options.dtype == "bfloat16"
    given = {} if options.contender == "trl_default" else {"gradient_checkpointing": False}
    arguments = SFTConfig(
        output_dir=str(options.folder / "trl"), use_cpu=True, max_steps=options.steps, learning_rate=LEARNING_RATE,
        per_device_train_batch_size=options.rows, lr_scheduler_type="constant", bf16=bf16,
        train_sampling_strategy="sequential", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        assistant_only_loss=True, max_length=None, dataloader_pin_memory=False, **given,
    )  # fmt: skip
    where = options.folder / "model"
    trainer = SFTTrainer(
        model=transformers.LlavaForConditionalGeneration.from_pretrained(where, dtype=getattr(torch, options.dtype)),
        args=arguments,
        train_dataset=table,
        processing_class=transformers.AutoProcessor.from_pretrained(where, use_fast=False),
        callbacks=[Clock()],
        peft_config=LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        ),
    )
    trainer.train()
    return {"ends": ends, "losses": losses}


def in_parts(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages as TRL takes pictures: parts of a content."""
    made = []
    for message in row["messages"]:
        parts: list[dict[str, Any]] = []
        for index, text in enumerate(message["content"].split(IMAGE)):
            parts += [{"type": "image", "text": None}] * (index > 0) + [{"type": "text", "text": text}] * bool(text)
        made.append({"role": message["role"], "content": parts})
    return made


def run(contender: str, options: argparse.Namespace) -> dict[str, Any]:
    """One contender in a fresh process."""
    out = options.folder / "out.json"
    command = [sys.executable, "-m", "benchmarks.pictures", "--contender", contender, "--out", str(out)]
    for name in ("data", "steps", "rows", "dtype", "folder", "cache"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    if options.cache:
        environment["LOWRANK_CACHE"] = str(options.folder / f"cache-{time.time_ns()}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stderr[-3000:]}")
    return json.loads(out.read_text())


def summarize(runs: list[dict[str, Any]], tokens: list[int]) -> dict[str, Any]:
    rates = [
        count / (end - start)
        for one in runs
        for count, start, end in list(zip(tokens, one["ends"], one["ends"][1:]))[1:]
    ]
    return {
        "tokens_per_second": statistics.median(rates),
        "peak_memory_bytes": statistics.median(one["peak_memory_bytes"] for one in runs),
        "losses": runs[0]["losses"],
    }


def compare_cache(runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> dict[str, Any]:
    """Processor seconds of each epoch with the cache and without, which other work on the machine stretches less than
    wall time, and their ratios; the first step of the run is left out."""
    losses = [one["losses"] for each in runs.values() for one in each]
    if any(each != losses[0] for each in losses):
        raise SystemExit(f"not the same work: losses are {losses}")

    def seconds(name: str, epoch: int) -> float:
        first, end = max(1, epoch * options.steps), (epoch + 1) * options.steps
        return statistics.median(one["processor"][end] - one["processor"][first] for one in runs[name])

    epochs = [{name: seconds(name, epoch) for name in runs} for epoch in range(options.cache)]
    return {
        "epochs": [{**each, "speedup": each["lowrank"] / each["cached"]} for each in epochs],
        "losses": losses[0],
        "entries": [one["entries"] for one in runs["cached"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="LLaMA-Factory's mllm_demo.json, pictures beside it")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tower-layers", type=int, default=6)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cache", type=int, default=0, metavar="EPOCHS", help="model.cache_vision_features, measured")
    parser.add_argument("--json", type=Path)
    for name, kind in (("contender", str), ("out", Path), ("folder", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        measured = trl(options) if options.contender.startswith("trl") else lowrank(options)
        options.out.write_text(json.dumps({**measured, "peak_memory_bytes": peak_memory()}))
        return
    contenders = ("lowrank", "cached") if options.cache else CONTENDERS
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as place:
        options.folder = Path(place)
        make_model(options.folder / "model", options)
        for _ in range(options.rounds):
            for name in contenders:
                runs[name].append(run(name, options))
    if options.cache:
        report = {"machine": describe("cpu"), "options": given_options(options), **compare_cache(runs, options)}
        print(json.dumps({name: report[name] for name in ("epochs", "entries")}, indent=1))
        write(report, options)
        return
    tokens = runs["lowrank"][0]["tokens"]
    found = {name: summarize(each, tokens) for name, each in runs.items()}
    first = [each["losses"][0] for each in found.values()]
    if max(first) - min(first) > 0.01 * min(first):
        raise SystemExit(f"not the same work: losses of the first step are {first}")
    ratios = {
        f"lowrank / {name}: {key}": found["lowrank"][key] / found[name][key]
        for name in CONTENDERS[1:]
        for key in ("tokens_per_second", "peak_memory_bytes")
    }
    given = given_options(options)
    report = {"machine": describe("cpu"), "options": given, "tokens": tokens, "found": found, "ratios": ratios}
    print(json.dumps({"tokens": tokens, "ratios": ratios, "first_losses": first}, indent=1))
    write(report, options)


def given_options(options: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "rounds", "rows", "layers", "tower_layers", "dtype", "cache")
    return {name: getattr(options, name) for name in names}


def write(report: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
