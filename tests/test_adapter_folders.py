"""An adapter's folder is asked through the template it was trained with, wherever it is opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import lowrank.pipelines.train
from lowrank.config import validate_settings
from lowrank.data import templates
from lowrank.data.chat.template import without_marks
from lowrank.data.config import DataConfig
from lowrank.pipelines.artifacts import data_of_adapter, find_artifacts
from lowrank.pipelines.export_source import open_source
from lowrank.pipelines.inference import folder_reader, open_inference_model
from lowrank.records import Conversation, Message
from lowrank.serve.engines.torch import BankEngine

QUESTION = Conversation((Message("user", "Hello"),))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vicuna") / "run"
    lowrank.pipelines.train.train(
        validate_settings(
            {
                "model": "lowrank/tiny",
                "data": {"train": "lowrank/demo", "chat_template": "vicuna"},
                "max_steps": 1,
                "micro_batch_tokens": 1024,
                "output_dir": str(folder),
            }
        )
    )
    return folder


def test_an_adapter_within_a_run_reads_as_the_run(run: Path) -> None:
    whole = open_inference_model(str(run))
    alone = open_inference_model(str(run / "default" / "best"))
    assert alone.render_prompt("best", QUESTION) == whole.render_prompt("default", QUESTION)
    assert "USER: Hello" in alone.render_prompt("best", QUESTION).prompt
    chosen = open_inference_model(str(run / "default" / "best"), chat_template="chatml")
    assert "<|im_start|>user" in chosen.render_prompt("best", QUESTION).prompt


def test_an_adapter_that_was_taken_elsewhere_reads_by_the_template_beside_it(run: Path, tmp_path: Path) -> None:
    text = templates.source_of("zephyr")
    alone = shutil.copytree(run / "default" / "best", tmp_path / "alone")
    moved = open_inference_model(str(alone))
    assert "USER: Hello" in moved.render_prompt("alone", QUESTION).prompt
    (alone / "chat_template.jinja").unlink()
    (alone / "tokenizer_config.json").unlink()
    assert data_of_adapter(alone) == DataConfig()
    (alone / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
    assert templates.source_of(data_of_adapter(alone).chat_template or "") == text
    (alone / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "default", "template": text}]}))
    assert templates.source_of(data_of_adapter(alone).chat_template or "") == text
    (alone / "chat_template.jinja").write_text(templates.source_of("chatml"))
    assert templates.source_of(data_of_adapter(alone).chat_template or "") == templates.source_of("chatml")
    assert find_artifacts(str(alone)).data_of["alone"] == data_of_adapter(alone)
    for broken in ('{"chat_template": 3}', "[", "[1]"):
        (alone / "chat_template.jinja").unlink(missing_ok=True)
        (alone / "tokenizer_config.json").write_text(broken)
        assert data_of_adapter(alone) == DataConfig()


def test_it_is_exported_with_the_template_it_is_asked_through(run: Path, tmp_path: Path) -> None:
    """Also where only tokenizer_config.json has it, as older programs save it."""
    alone = Path(shutil.copytree(run / "default" / "best", tmp_path / "alone"))
    (alone / "chat_template.jinja").unlink()
    (alone / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates.source_of("zephyr")}))
    rendered = open_inference_model(str(alone)).render_prompt("alone", QUESTION)
    exported = open_source(str(alone))
    assert exported.source.chat_template == without_marks(rendered.chat_template or "")
    assert exported.source.chat_template != open_source(str(run)).source.chat_template
    assert open_source(str(run / "default" / "best")).source.chat_template == open_source(str(run)).source.chat_template


def test_adapters_that_come_later_bring_their_templates(run: Path) -> None:
    base = open_inference_model("lowrank/tiny")
    read = folder_reader(base.base.tokenizer, base.renderer, base.renderers, None)
    engine = BankEngine(base.base, base.bank, base.renderer, base.slots, roots=[run.parent], read=read)
    engine.cache.register_all(run)
    engine.publish("mine", "run/default/best")
    for name in ("default", "mine"):
        assert "USER: " in engine.chat_template(name)
        assert "USER: Hello" in base.base.tokenizer.decode(engine._renderer_of(name).prompt(QUESTION))
    assert "USER: " not in engine.chat_template("base")
    same = folder_reader(base.base.tokenizer, base.renderer, base.renderers, "chatml")
    assert same(run / "default" / "best") is base.renderer
