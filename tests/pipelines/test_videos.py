"""A whole run on videos from LLaMA-Factory's files; wants torchvision."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank.compat import load_any
from lowrank.errors import ModelError
from lowrank.media.torchvision import torchvision_problem
from lowrank.pipelines.train import train
from tests.media_rows import write_dataset_info
from tests.tiny_video_models import save_watching_folder
from tests.video_rows import write_video_rows

VIDEO_LORA_SFT = """\
model_name_or_path: model
image_max_pixels: 262144
video_max_pixels: 16384
video_fps: 2.0
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: mllm_video_demo
dataset_dir: data
template: qwen3_vl_nothink
cutoff_len: 2048
output_dir: saves
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 1.0
"""
"""As its file for Qwen3-VL, of videos."""


def test_a_file_of_llama_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torchvision is missing, that is said before any weights are read."""
    save_watching_folder(tmp_path / "model", "qwen3_vl")
    write_video_rows(tmp_path / "data")
    write_dataset_info(tmp_path / "data", "mllm_video_demo", "video.json", "videos")
    (tmp_path / "run.yaml").write_text(VIDEO_LORA_SFT)
    monkeypatch.chdir(tmp_path)
    config, _ = load_any(tmp_path / "run.yaml")
    assert (config.model.video_max_pixels, config.model.video_fps) == (16384, 2.0)
    if torchvision_problem() is None:
        assert train(config)["jobs"]
        return
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"makes videos ready by torchvision, and .*lowrank-llm\[video\]"):
        train(config)
