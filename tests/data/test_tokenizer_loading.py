"""The tokenizer that is loaded without the model's configuration class is transformers' own, to the settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from lowrank.models.config import named_model
from lowrank.models.loading.tokenizer import load_tokenizer
from tests.checkpoint_folder import save_checkpoint_folder

TEXT = "A question about 3 lemons\n\n— und 中文 <|im_end|>"


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "gemma2", "gpt2", "phi3"])
@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast"])
def test_equal_to_auto_tokenizer(tmp_path: Path, model_type: str, named: str) -> None:
    folder = tmp_path / "model"
    save_checkpoint_folder(folder)
    for file, change in (
        ("config.json", {"model_type": model_type}),
        ("tokenizer_config.json", {"tokenizer_class": named}),
    ):
        settings: dict[str, Any] = {**json.loads((folder / file).read_text()), **change}
        (folder / file).write_text(json.dumps(settings))
    expected = transformers.AutoTokenizer.from_pretrained(folder)
    found = load_tokenizer(named_model(str(folder)))
    assert type(found) is type(expected)
    assert found(TEXT).input_ids == expected(TEXT).input_ids
    assert found.init_kwargs == expected.init_kwargs
    assert found.special_tokens_map == expected.special_tokens_map
