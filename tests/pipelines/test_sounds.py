"""Whole runs on sounds, from LLaMA-Factory's files too; and what is not done with sounds yet."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from lowrank.compat import load_any
from lowrank.config import RunConfig
from lowrank.data.config import SourceConfig
from lowrank.errors import DataError
from lowrank.generate.request import GenerationConfig
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.pipelines.job_data import prepare_all
from lowrank.pipelines.predict import PredictRequest, predict
from lowrank.pipelines.train import train
from tests.media_rows import write_dataset_info
from tests.pipelines.test_train import Stopper, run, weights
from tests.sound_rows import write_sound_rows
from tests.tiny_audio_models import RATE, save_audio_folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_audio_folder(folder / "model", "qwen2_audio")
    write_sound_rows(folder, RATE)
    return folder


def settings(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(world / "model"), "dtype": "float32", "device": "cpu"},
        "data": {"train": [str(world / "audio.json")], "eval": [str(world / "audio.json")], "batch_size": 2},
        "output_dir": str(out),
        "micro_batch_tokens": 200,
        "optimizer": {"learning_rate": 1e-2},
        "num_train_epochs": 3,
        "jobs": [{"name": "a", "adapter": {"rank": 4, "dropout": 0.1}}, {"name": "b", "adapter": {"rank": 8}}],
        **changes,
    }


@pytest.mark.slow
def test_jobs_learn_and_resume_to_the_same_bits(world: Path, tmp_path: Path) -> None:
    _, whole = run(settings(world, tmp_path / "whole"))
    assert whole.losses("a")[-1] < whole.losses("a")[0] - 0.05
    stopper, given = Stopper(), settings(world, tmp_path / "cut")
    assert train(RunConfig(**given), reporters=[stopper])["interrupted"]
    run({**given, "resume": True})
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)


AUDIO_LORA_SFT = """\
model_name_or_path: model
trust_remote_code: true
audio_sampling_rate: 16000
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: mllm_audio_demo
dataset_dir: data
template: qwen2_audio
cutoff_len: 2048
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: saves
logging_steps: 10
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 1.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""
"""A file as LLaMA-Factory's for pictures, of a model that hears."""


def test_a_file_of_llama_factory(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").symlink_to(world / "model")
    write_sound_rows(tmp_path / "data", RATE)
    write_dataset_info(tmp_path / "data", "mllm_audio_demo", "audio.json", "audios")
    (tmp_path / "run.yaml").write_text(AUDIO_LORA_SFT)
    monkeypatch.chdir(tmp_path)
    config, _ = load_any(tmp_path / "run.yaml", ["report_to=none"])
    result = train(config)
    assert result["jobs"]


def test_a_missing_sound_is_named_before_the_model_loads(world: Path, tmp_path: Path) -> None:
    write_sound_rows(tmp_path, RATE)
    for file in (tmp_path / "sounds").glob("*.wav"):
        file.unlink()
    given = settings(world, tmp_path / "run", data={"train": [str(tmp_path / "audio.json")]})
    folder = save_audio_folder(tmp_path / "hearing", "qwen2_audio")
    (folder / "model.safetensors").write_bytes(b"no weights")
    given["model"]["path"] = str(folder)
    with pytest.raises(DataError, match=r"4 rows .* of 4 left out: a sound is missing; the first: .*sounds/0.wav"):
        train(RunConfig(**given))


def test_answers_about_sounds_are_refused_in_words(world: Path, tmp_path: Path) -> None:
    request = PredictRequest(
        str(world / "model"), (SourceConfig(path=str(world / "audio.json"), max_samples=2),), tmp_path / "out",
        metrics=("exact_match",), sampling=GenerationConfig(max_new_tokens=3), perplexity=False,
    )  # fmt: skip
    notices: list[str] = []
    result, _ = predict(request, lambda _: contextlib.nullcontext(lambda done, total: None), notices.extend)
    assert result["unanswered"] == {"base": 2}
    assert any(
        "does not accept sounds here: lowrank trains on them but does not generate from them yet" in each
        for each in notices
    ), notices


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"model": {"image_max_pixels": 1000}}, ["model.image_max_pixels has no effect: no row has pictures"]),
        ({"model": {"image_min_pixels": 9}}, ["model.image_min_pixels has no effect: no row has pictures"]),
        ({"model": {"video_fps": 1.0}}, ["model.video_fps has no effect: no row has videos"]),
        (
            {"data": {"check_pictures": "decode"}},
            ["data.check_pictures: decode has no effect: no row has pictures, videos or sounds"],
        ),
        (
            {"model": {"cache_vision_features": True}},
            ["model.cache_vision_features: true has no effect: no row has pictures or videos"],
        ),
        ({}, []),
    ],
)
def test_settings_of_media_without_media(given: dict[str, Any], expected: list[str]) -> None:
    """A text base and its rows."""
    config = RunConfig(
        model={"path": "lowrank/tiny", **given.get("model", {})},  # type: ignore[arg-type]
        data={"train": ["lowrank/demo"], "max_samples": 8, **given.get("data", {})},  # type: ignore[arg-type]
        output_dir="out",
    )
    received: list[Any] = []
    prepare_all(config.jobs, config.model, load_tokenizer(config.model), received.append, strict=False)
    assert [each.text for each in received if "no effect" in each.text] == expected
