"""What Unsloth's own notebooks use is there, or refused in words; the page says so."""

from __future__ import annotations

from pathlib import Path

from tests.compat.unsloth_notebooks import passing, problem, read_facts, stopped, table, trains_on_text, uses_of

ROOT = Path(__file__).parent.parent.parent
BEGIN, END = (
    "<!-- table of names: python -m tests.compat.unsloth_notebooks --table -->\n\n",
    "\n<!-- end of the table -->",
)


def test_nine_of_ten_notebooks_pass_and_the_others_are_told_why() -> None:
    count, bits = read_facts()
    assert count >= 83
    assert passing(count, bits) >= 0.9 * count - 1
    for use, why in stopped(bits, also_unrun=True).items():
        assert len(why) > 15, use


def test_the_check_can_fail(tmp_path: Path) -> None:
    import json

    code = ["%%capture\n!pip install x", "from unsloth import FastLanguageModel, FastThing\nfrom trl import SFTTrainer",
            "model, tokenizer = FastLanguageModel.from_pretrained('x', load_in_4bit=True, max_length=3)",
            "trainer = SFTTrainer(model=model, tokenizer=tokenizer, max_seq_length=4, sequence=5)\n"
            "if False: model.save_pretrained_merged('x', tokenizer, save_method='mxfp4')"]  # fmt: skip
    cells = [{"cell_type": "code", "source": [text]} for text in code]
    path = tmp_path / "Some-Alpaca.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    assert trains_on_text(path)
    found = {(use.of, use.name) for use in stopped(dict.fromkeys(uses_of(path), 1))}
    assert found == {("import unsloth", "FastThing"), ("FastLanguageModel.from_pretrained", "max_length"),
                     ("SFTTrainer", "sequence")}  # fmt: skip
    assert problem("model.save_pretrained_merged", "save_method", "'mxfp4'") is not None


def test_the_page_has_the_table() -> None:
    text = (ROOT / "docs/unsloth.md").read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] + "\n" == table() + "\n" or table() in text
