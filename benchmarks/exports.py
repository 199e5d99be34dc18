"""From training to every form a model is exported in: do they still answer as the adapter does?

python -m benchmarks.exports [--steps 120] [--prompts 200] [--targets peft,merged,...] [--out FILE]

Trains one adapter of `lowrank demo` on the base that ships with lowrank, writes every target, and asks the adapter and
all that was written (GGUF files in llama.cpp) the same held-out questions of the demo. Exact match: letter for letter
the answer in the data.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import lowrank.data.demo as demo
from benchmarks.machine import describe
from lowrank.cli.export_settings import read_targets
from lowrank.config import load
from lowrank.data.config import SourceConfig
from lowrank.data.formats.built_in import messages
from lowrank.data.sources.rows import read_rows
from lowrank.export import ExportReader
from lowrank.export.verify.readers import read_adapter
from lowrank.pipelines.export import export_targets
from lowrank.pipelines.export_checks import export_requests
from lowrank.pipelines.export_source import ResolvedSource, open_source
from lowrank.pipelines.train import train
from lowrank.records import Conversation

TARGETS = "peft,merged,merged_4bit,compressed_tensors,gptq,awq,gguf,lora_gguf,ollama"
OPTIONS = ["gguf.types=f16,q8_0,q6_k,q4_k_m,q4_0,q3_k_m,q2_k"]
_NEW_TOKENS = 96
_DEMO = Path(demo.__file__).parent / "demo.yaml"
ONE_JOB = "jobs=[{name: r16, adapter: {rank: 16}}]"


def questions(found: ResolvedSource, count: int) -> list[tuple[Any, str]]:
    """Prompt tokens and the answer in the data."""
    rows = read_rows(SourceConfig(path="lowrank/demo-heldout"), seed=0, max_samples=count)
    talks = [messages(dict(row.values), {}, {}) for row in rows]
    return [
        (found.renderer.prompt(Conversation(talk.messages[:-1], talk.tools)), talk.messages[-1].content)
        for talk in talks
    ]


def exact_match(reader: ExportReader, found: ResolvedSource, held_out: list[tuple[Any, str]]) -> float:
    """The share of questions that are answered as in the data."""
    source = found.source
    answers = reader.greedy([prompt for prompt, _ in held_out], _NEW_TOKENS, source.stop_tokens, lambda done: None)
    texts = [source.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]
    return sum(text == expected.strip() for text, (_, expected) in zip(texts, held_out)) / len(held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--targets", default=TARGETS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    options = [option for option in OPTIONS if option.partition(".")[0] in arguments.targets.split(",")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        run = Path(name, "run")
        train(load(_DEMO, [f"output_dir={run}", f"max_steps={arguments.steps}", ONE_JOB]))
        found = open_source(str(run))
        held_out = questions(found, arguments.prompts)
        with read_adapter(found.source, found.source.adapter) as reader:
            trained = exact_match(reader, found, held_out)
        targets = read_targets(arguments.targets, options, {})
        requests = export_requests(targets, Path(name, "home"))
        result = export_targets(found, requests)
        print(f"\nbase + adapter: {trained:.1%} of {len(held_out)} held-out questions answered exactly\n")
        print("| | exact match | mean KL | KL from the 16-bit file | gain kept | bytes |\n|---|---|---|---|---|---|")
        for each in requests:
            reported = result["targets"][each.type]
            for read_back, compared in zip(
                each.config.build().read_back(found.source, each.folder), reported["comparisons"]
            ):
                with read_back.open() as reader:
                    score = exact_match(reader, found, held_out)
                row = {
                    "target": each.type, "name": read_back.name, "exact_match": score, "mean_kl": compared["mean_kl"],
                    "kl_from_16_bits": compared["against_mean_kl"], "gain_kept": compared["gain_kept"],
                    "passed": compared["passed"], "bytes": reported["bytes"],
                }  # fmt: skip
                rows.append(row)
                between = "" if row["kl_from_16_bits"] is None else f"{row['kl_from_16_bits']:.2g}"
                gain = "" if row["gain_kept"] is None else f"{row['gain_kept']:.1%}"
                print(f"| {each.type} {read_back.name} | {score:.1%} | {row['mean_kl']:.2g} | {between} | {gain} "
                      f"| {reported['bytes']:,} |", flush=True)  # fmt: skip
    if arguments.out:
        written = {"machine": describe("cpu"), "steps": arguments.steps, "prompts": len(held_out), "trained": trained,
                   "targets": rows}  # fmt: skip
        arguments.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
