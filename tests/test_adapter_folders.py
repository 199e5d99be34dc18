"""An adapter's folder is asked through the template it was trained with, wherever it is opened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import lowrank
import lowrank.pipelines.train
from lowrank.checkpoints.adapter_folder import adapters_in
from lowrank.config import validate_settings
from lowrank.data import templates
from lowrank.data.chat.template import without_marks
from lowrank.data.config import DataConfig
from lowrank.errors import ConfigError, ModelError
from lowrank.pipelines.artifacts import data_of_adapter, find_artifacts
from lowrank.pipelines.export_source import open_source
from lowrank.pipelines.inference import folder_reader, open_inference_model
from lowrank.records import Conversation, Message
from lowrank.serve.chat_backends import adapters_among
from lowrank.serve.engines import ServingOptions
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
    assert alone.names == ["base", "default"]
    assert alone.render_prompt("default", QUESTION) == whole.render_prompt("default", QUESTION)
    assert "USER: Hello" in alone.render_prompt("default", QUESTION).prompt
    chosen = open_inference_model(str(run / "default" / "best"), chat_template="chatml")
    assert "<|im_start|>user" in chosen.render_prompt("default", QUESTION).prompt


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


@pytest.fixture
def not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank.models.loading.pretrained.load", lambda *_, **__: pytest.fail("a model is loaded"))


def test_a_base_is_loaded_with_several_adapters(run: Path, tmp_path: Path) -> None:
    poet = shutil.copytree(run / "default" / "best", tmp_path / "poet")
    model = lowrank.load("lowrank/tiny", adapters=[run / "default" / "best", str(poet)])
    assert model.adapters == ["default", "poet"]
    digests = model.inference.versions(["base", "default", "poet"])
    (digest,) = lowrank.load(run).inference.versions(["default"]).values()
    assert digests == {"base": "base", "default": digest, "poet": digest}
    assert model.inference.render_prompt("poet", QUESTION).prompt.startswith("A chat")
    assert not model.inference.render_prompt("base", QUESTION).prompt.startswith("A chat")
    beside = lowrank.load(run, adapters={"mine": poet, "default": run / "default"})
    assert beside.adapters == ["default", "mine"], "the run's own is there once"


@pytest.mark.usefixtures("not_loaded")
def test_what_is_no_adapter_is_refused_before_a_model_is_loaded(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    wrong = [tmp_path / "nowhere", tmp_path / "empty", tmp_path / "lora.gguf"]
    with pytest.raises(ConfigError) as caught:
        lowrank.load("lowrank/tiny", adapters=wrong)
    expected = ("no such folder", "no adapter_config.json in it", "beside a base that is a .gguf file")
    assert len(caught.value.problems) == 3
    for problem, path, reason in zip(caught.value.problems, wrong, expected):
        assert str(path) in problem
        assert reason in problem
    shutil.copytree(run / "default" / "best", tmp_path / "default")
    for path, adapters in ((run, [tmp_path / "default"]), ("lowrank/tiny", {"base": run / "default"})):
        with pytest.raises(ConfigError, match=r"is another's name already; in Python, adapters=\{'NAME'"):
            lowrank.load(path, adapters=adapters)
    with pytest.raises(ConfigError, match=r"default: not in llama\.cpp's layout.*lowrank export .* --to lora_gguf"):
        lowrank.load(tmp_path / "tiny.gguf", adapters=[run / "default"])


@pytest.mark.usefixtures("not_loaded")
def test_a_name_nobody_has_is_refused_before_a_model_is_loaded(run: Path) -> None:
    with pytest.raises(ModelError, match="there is no adapter 'defautl' here; did you mean 'default'"):
        open_inference_model(str(run), answering=["defautl"])


@pytest.mark.usefixtures("not_loaded")
def test_which_is_best_or_last(run: Path, tmp_path: Path) -> None:
    for call in (
        lambda: lowrank.load(run, which="final"),  # type: ignore[arg-type]
        lambda: lowrank.load(tmp_path / "x.gguf", which="final"),  # type: ignore[arg-type]
        lambda: lowrank.export(run, "peft", tmp_path / "out", which="final"),  # type: ignore[arg-type]
        lambda: open_source(str(run / "default" / "best"), which="final"),
        lambda: ServingOptions(which="final"),
        lambda: find_artifacts(str(run), which="final"),
        lambda: open_inference_model(str(run), which="final"),
    ):
        with pytest.raises(ConfigError, match=r"which: 'final'; expected 'best' .* or 'last'"):
            call()


def test_adapters_of_two_runs_are_told_apart(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    places = [str(each / "default" / "best") for each in (run, other)]
    assert open_source(places[0], adapters=[places[1]]).source.name == "default+default-2"
    assert adapters_among([*places, "base", "tiny.gguf"]) == (
        {"default": places[0], "default-2": places[1], "tiny": "tiny.gguf"},
        ["default", "default-2", "base", "tiny"],
    )
    assert adapters_in(other / "default" / "best") == {"default": other / "default" / "best"}
    assert adapters_in(other) == {"default": other / "default" / "best"}
