"""Whole runs on pictures: jobs on one base, stopped and resumed to the same bits, streamed, merged, taken home."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from lowrank.config import RunConfig
from lowrank.data.config import DataConfig
from lowrank.data.prepare import prepare
from lowrank.errors import ModelError
from lowrank.models.config import ModelConfig
from lowrank.models.loading.quiet import quiet_transformers
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.pipelines.export_source import open_source
from lowrank.pipelines.rank_agreement import data_digest
from lowrank.pipelines.train import train
from lowrank.records import Conversation
from lowrank.report.events import Notice, StepDone
from lowrank.serve.vllm_engine.adapters import refuse_own_rows
from tests.export.sources import write_merged
from tests.picture_rows import write_picture_rows
from tests.pipelines.pictures.settings import settings
from tests.pipelines.test_train import Stopper, run, weights


@pytest.mark.slow
def test_jobs_learn_and_resume_to_the_same_bits(world: Path, tmp_path: Path) -> None:
    _, whole = run(settings(world, tmp_path / "whole"))
    assert whole.losses("a")[-1] < whole.losses("a")[0] - 0.05
    stopper, given = Stopper(), settings(world, tmp_path / "cut")
    assert train(RunConfig(**given), reporters=[stopper])["interrupted"]
    _, rest = run({**given, "resume": True})
    for job in ("a", "b"):
        assert stopper.losses(job) + rest.losses(job) == whole.losses(job)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert one
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("packs", [True, False])
def test_a_stream_may_show_its_first_picture_late(
    packs: bool, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the rows that are looked at beforehand. Where that would change the layout, they are left out, and it is
    said."""
    monkeypatch.setattr("lowrank.data.prepare._ROWS_AHEAD", 2)
    monkeypatch.setattr("lowrank.data.batching.dataloader._WINDOW", 2)
    write_picture_rows(tmp_path)
    rows = json.loads((tmp_path / "mllm.json").read_text("utf-8"))[:2]
    text = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "He."}]}
    lines = [json.dumps(each) + "\n" for each in (text, text, text, *rows, text)]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    data = {"train": [str(tmp_path / "rows.jsonl")], "streaming": True, "batch_size": 1, "shuffle": False}
    given = settings(world, tmp_path / "run", data=data, eval_steps=None, max_steps=7)
    given["jobs"] = given["jobs"][:1]
    if not packs:
        monkeypatch.setattr("lowrank.models.checks.media_isolation._what_leaks", lambda base: "it mixes them up")
    _, ear = run(given)
    tokens = [event.tokens for event in ear.events if isinstance(event, StepDone)]
    notices = [event.text for event in ear.events if isinstance(event, Notice)]
    found = [each for each in notices if "none of the rows read so far from the stream has pictures" in each]
    if not packs:
        assert len(set(tokens)) == 1
        assert re.search("will be skipped because .* in the packed layout: .*To train on them put one among", found[0])
        assert any("2 rows" in each and "loaded without" in each for each in notices)
    else:
        assert [each > tokens[0] for each in tokens] == [False, False, False, True, True, False, False]
        assert not found


def test_other_pictures_are_other_data(world: Path, tmp_path: Path) -> None:
    """Of equal sizes, so that the tokens are the same: what several machines compare before they train together."""
    tokenizer = load_tokenizer(ModelConfig(path=str(world / "model")))

    def digest(folder: Path) -> str:
        config = DataConfig(train=(str(folder / "mllm.json"),))  # type: ignore[arg-type]
        return data_digest(prepare(config, tokenizer=tokenizer, record=Conversation, seed=0))

    write_picture_rows(tmp_path)
    assert digest(tmp_path) == digest(world)
    file = tmp_path / "pictures" / "1.jpg"
    with Image.open(file) as image:
        size = image.size
    Image.new("RGB", size, "red").save(file)
    assert digest(tmp_path) != digest(world)


def test_an_adapter_on_the_tower_goes_home_whole(world: Path, tmp_path: Path) -> None:
    """PEFT loads it, and the merged model looks as it does."""
    adapter = {"rank": 2, "freeze_vision_tower": False, "freeze_multi_modal_projector": False}
    given = settings(world, tmp_path / "run", max_steps=2, eval_steps=None, jobs=[{"name": "a", "adapter": adapter}])
    given["data"].pop("eval")
    run(given)
    source = open_source(str(tmp_path / "run")).source
    assert source.adapter is not None
    assert sum("visual" in name for name in source.adapter.targets) == 12
    out = write_merged(source, tmp_path / "out")
    merged = load_file(out / "model.safetensors")
    with quiet_transformers():
        model = transformers.AutoModelForMultimodalLM.from_pretrained(world / "model")
        twin = peft.PeftModel.from_pretrained(model, str(tmp_path / "run" / "a" / "last")).merge_and_unload()
        twin.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    before = load_file(world / "model" / "model.safetensors")
    assert merged.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)
    assert any("visual" in name and not torch.equal(merged[name], before[name]) for name in before)
    with pytest.raises(ModelError, match=r"adapters on model.visual.*beside the language model, which vLLM leaves out"):
        refuse_own_rows(tmp_path / "run" / "a" / "last", ModelConfig(path=str(world / "model")))


def test_a_merged_model_looks_as_closely_as_in_training(world: Path, tmp_path: Path) -> None:
    given = settings(world, tmp_path / "run", max_steps=1, eval_steps=None, jobs=[{"name": "a"}])
    given["model"] |= {"image_max_pixels": 640, "image_min_pixels": 100}
    given["data"].pop("eval")
    train(RunConfig(**given))
    source = open_source(str(tmp_path / "run")).source
    assert source.facts["pictures"]
    out = write_merged(source, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (world / "model", out))
    towers = [name for name in before if "visual" in name]
    assert len(towers) > 10
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in towers)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    read = [transformers.AutoImageProcessor.from_pretrained(folder, backend="pil") for folder in (world / "model", out)]
    assert [dict(each.size) for each in read] == [
        {"shortest_edge": 64, "longest_edge": 1024},
        {"shortest_edge": 100, "longest_edge": 640},
    ]
    rest = [{key: value for key, value in each.to_dict().items() if key != "size"} for each in read]
    assert rest[0] == rest[1]
