"""A tiny random checkpoint with a real tokenizer and chat template on disk, and datasets beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def save_checkpoint_folder(path: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A two-layer Llama with a byte-level tokenizer, as `from_pretrained` reads it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=259, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False)
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(fast),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": fast.eos_token_id,
        "pad_token_id": fast.pad_token_id,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes})).to(dtype)
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


def write_alpaca(path: Path, num_rows: int, start: int = 0) -> Path:
    """Rows a model can learn: the answer repeats the question's number."""
    rows = [
        {"instruction": f"Say {number}", "input": "", "output": f"{number} {number}"}
        for number in range(start, start + num_rows)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path
