"""A model that sees pictures, tuned on text from the command's end to end: trained, exported, asked."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import lowrank
from lowrank.checkpoints.model_card import image_code
from tests.checkpoint_folder import write_alpaca
from tests.data.made_tokenizers import tokenizer_of
from tests.tiny_composites import save_composite_folder

IN_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trained(tmp_path: Path, family: str, **text: Any) -> tuple[Path, Path]:
    """(base, run folder) of two jobs in one run, and a base whose template reads contents in parts."""
    base = save_composite_folder(tmp_path / "base", family, vocab_size=640, **text)
    tokenizer = tokenizer_of("qwen2_5")
    tokenizer.chat_template = IN_PARTS
    tokenizer.save_pretrained(base)
    lowrank.train(
        model={"path": str(base), "dtype": "float32", "device": "cpu"},
        data={"train": [str(write_alpaca(tmp_path / "rows.json", 12))], "batch_size": 4},
        optimizer={"learning_rate": 1e-2},
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        jobs=[{"name": "a", "adapter": {"rank": 4}}, {"name": "b", "adapter": {"rank": 8}}],
        progress=False,
    )
    return base, tmp_path / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "targets", "text"),
    [
        ("llava", ["peft", "merged", {"type": "gguf", "types": ["f32"]}], {"head_dim": 16}),
        ("qwen2_5_vl", ["peft", "merged"], {}),
        ("qwen3_5", ["peft", "merged"], {}),
        ("gemma3", ["peft", "merged"], {}),
        ("paligemma", ["peft", "merged"], {}),
    ],
)
def test_from_rows_to_what_others_run(family: str, targets: list[Any], text: dict[str, Any], tmp_path: Path) -> None:
    base, run = trained(tmp_path, family, **text)
    result = lowrank.export(run, targets, tmp_path / "out", adapters="a")
    assert result["passed"]
    if any(not isinstance(each, str) for each in targets):
        assert any("language model alone" in note for note in result["targets"]["gguf"]["notes"])
    token_1T = torch.tensor([[5, 9, 11, 300, 8]])
    options: dict[str, Any] = {"dtype": torch.float32}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        plain: Any = transformers.AutoModelForMultimodalLM.from_pretrained(base, **options)
        adapted = PeftModel.from_pretrained(plain, str(tmp_path / "out" / "peft")).eval()
        merged: Any = transformers.AutoModelForMultimodalLM.from_pretrained(
            tmp_path / "out" / "merged", **options
        ).eval()
        with torch.no_grad():
            wanted = adapted(input_ids=token_1T).logits
            torch.testing.assert_close(merged(input_ids=token_1T).logits, wanted, rtol=0, atol=1e-4)
    assert json.loads((tmp_path / "out" / "merged" / "config.json").read_text())["model_type"] == family
    code = (tmp_path / "out" / "merged" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    text_alone = code.replace(image_code("path/of/this/folder").strip(), "")  # no processor can be made of its file
    assert text_alone != code
    exec(text_alone.replace("path/of/this/folder", str(tmp_path / "out" / "merged")).replace("=100", "=2"), {})
    with lowrank.load(tmp_path / "out" / "merged", notify=lambda _: None) as model:
        assert len(model.answers(["Say 7"], max_new_tokens=4, temperature=0)[0].tokens) > 0
