"""What every contender is given: a model folder, a tokenizer, and the same token rows with the same loss masks."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from lowrank.data.batching.packing import best_fit
from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.records import Conversation, Message

QWEN_05B = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
"""Qwen2.5-0.5B: 494 M parameters with the head tied to the embedding."""


@dataclass(frozen=True)
class Row:
    """One sample: its tokens, and 1 for those that are learned."""

    tokens: list[int]
    learned: list[int]


@dataclass(frozen=True)
class Workload:
    """A prepared folder: `model/` (bf16 safetensors, tokenizer), `rows.json`."""

    folder: Path
    rows: list[Row]
    source: str
    """Where the rows came from, for the result file."""

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    def packed(self, tokens_per_step: int) -> list[list[int]]:
        """Row numbers of steps filled by best fit decreasing, as TRL packs; the emptiest left out, in a mixed order."""
        falling = sorted(range(len(self.rows)), key=lambda number: -len(self.rows[number].tokens))
        steps = [
            sorted(falling[place] for place in members)
            for members in best_fit([len(self.rows[number].tokens) for number in falling], tokens_per_step)
        ]
        full = [step for step in steps if sum(len(self.rows[i].tokens) for i in step) > 0.95 * tokens_per_step]
        random.Random(0).shuffle(full)
        return full

    def batched(self, rows_per_step: int) -> list[list[int]]:
        """Row numbers of steps of `rows_per_step` rows, in order."""
        return [list(range(first, first + rows_per_step)) for first in range(0, len(self.rows), rows_per_step)]


def prepare(folder: Path, data: Path | None, num_rows: int, shape: dict[str, Any] | None = None) -> Workload:
    """Write model, tokenizer and rows into `folder`."""
    texts, source = _texts(data, num_rows)
    tokenizer = _train_tokenizer([part for pair in texts for part in pair])
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**{**QWEN_05B, **(shape or {})})
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    renderer = Renderer(tokenizer, DataConfig(chat_template="chatml", max_length=1024))
    rows = []
    for question, answer in texts:
        rendering = renderer.render(Conversation((Message("user", question), Message("assistant", answer))))
        for segment in rendering.segments:
            rows.append(Row(segment.token_L.tolist(), [int(weight > 0) for weight in segment.weight_L]))
    (folder / "rows.json").write_text(json.dumps({"source": source, "rows": [asdict(row) for row in rows]}))
    return Workload(folder, rows, source)


def read(folder: Path) -> Workload:
    """What `prepare` wrote."""
    saved = json.loads((folder / "rows.json").read_text())
    return Workload(folder, [Row(**row) for row in saved["rows"]], saved["source"])


def _texts(data: Path | None, num_rows: int) -> tuple[list[tuple[str, str]], str]:
    """(question, answer) pairs of an alpaca file; without one, random words with about its lengths."""
    if data is not None:
        rows = json.loads(data.read_text(encoding="utf-8"))[:num_rows]
        pairs = [("\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]) for row in rows]
        return pairs, f"{data.name}, first {len(pairs)} rows"
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(3000)]

    def sentence(median: float, spread: float) -> str:
        return " ".join(draw.choices(vocabulary, k=min(700, max(3, round(draw.lognormvariate(0.0, spread) * median)))))

    return [(sentence(12, 0.5), sentence(120, 0.8)) for _ in range(num_rows)], f"{num_rows} synthesised rows"


def _train_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE of 8,192 tokens, which compresses these few rows about as Qwen's own compresses English."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def count_parameters(config: dict[str, Any]) -> int:
    """Parameters of a model of this configuration, shared ones once."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**config))
    return sum(parameter.numel() for parameter in model.parameters())
