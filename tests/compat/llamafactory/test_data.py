"""The datasets that a LLaMA-Factory file names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowrank.data.chat.rendering import Renderer
from lowrank.data.prepare import examine
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load_tokenizer
from lowrank.records import Preference, Rated
from tests.compat.llamafactory.files import MINIMAL, problems, read


@pytest.mark.parametrize("dataset", ["identty", "pairs"])
def test_datasets_that_cannot_be_used(workplace: Path, dataset: str) -> None:
    (problem,) = problems(workplace, MINIMAL, f"dataset={dataset}")
    assert problem.startswith(f"dataset '{dataset}': ")


def test_interleaving(workplace: Path) -> None:
    text = MINIMAL.replace("identity", "identity,alpaca_en_demo")
    config, _ = read(workplace, text + "mix_strategy: interleave_under\ninterleave_probs: 0.25,0.75\n")
    assert config.data.mix == "interleave"
    assert [source.weight for source in config.data.train] == [0.25, 0.75]


def test_online_datasets_are_hub_names(workplace: Path) -> None:
    config, _ = read(workplace, MINIMAL + "dataset_dir: ONLINE\n", "dataset=a/b,c/d")
    assert [source.path for source in config.data.train] == ["a/b", "c/d"]


@pytest.mark.parametrize(
    ("stage", "name", "record"),
    [("dpo", "dpo_en_demo", Preference), ("rm", "dpo_zh_demo", Preference), ("kto", "kto_en_demo", Rated)],
)
def test_their_preference_data(shared_data: Path, workplace: Path, stage: str, name: str, record: type) -> None:
    """Found through their dataset_info.json; the doctor loses no row."""
    text = MINIMAL.replace("dataset: identity", f"dataset: {name}")
    config, _ = read(workplace, text + f"stage: {stage}\ndataset_dir: {shared_data}\n")
    tokenizer = load_tokenizer(ModelConfig(path="lowrank/tiny"))
    data = config.data.model_copy(update={"max_length": 100_000, "chat_template": None})
    report = examine(data, renderer=Renderer(tokenizer, data), record=record)
    (dataset,) = report.datasets
    rows = len(json.loads((shared_data / f"{name}.json").read_text()))
    assert (dataset.read, dataset.used) == (rows, rows)


def test_their_whole_dataset_info(shared_data: Path, workplace: Path) -> None:
    info = json.loads((shared_data / "dataset_info.json").read_text())
    usable = [name for name, entry in info.items() if entry.get("file_name") and not entry.get("ranking")]
    usable = [name for name in usable if not name.startswith("mllm")]
    text = MINIMAL + f"dataset_dir: {shared_data}\n"
    files = [name for name in usable if (shared_data / info[name]["file_name"]).exists() and name != "c4_demo"]
    config, _ = read(workplace, text, f"dataset={','.join(files)}")
    assert [Path(source.path).name for source in config.data.train] == [info[name]["file_name"] for name in files]
    assert len(files) >= 5


def test_sounds_lie_where_their_files_say(workplace: Path) -> None:
    """`media_dir` as for pictures; the rate is the model's own."""
    info = {"file_name": "identity.json", "formatting": "sharegpt", "columns": {"messages": "m", "audios": "a"}}
    place = workplace / "data" / "dataset_info.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"mllm_audio_demo": info}))
    (workplace / "sounds").mkdir()
    text = MINIMAL.replace("identity", "mllm_audio_demo") + "media_dir: sounds\naudio_sampling_rate: 16000\n"
    (job,) = read(workplace, text)[0].jobs
    (source,) = job.data.train
    assert (source.columns["audios"], Path(str(source.media_dir))) == ("a", Path("sounds"))
