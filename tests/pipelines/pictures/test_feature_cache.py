"""Features of pictures kept on disk: the same bits, no pass of the tower where they are known, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.batches import pack
from lowrank.config import RunConfig, validate_settings
from lowrank.errors import ConfigError, ModelError
from lowrank.models.feature_cache import FeatureCache, tower_digest
from lowrank.models.tower import Tower
from lowrank.pipelines.train import train
from lowrank.report.events import Notice
from tests.picture_rows import write_picture_rows
from tests.pipelines.test_train import run
from tests.tiny_vision_models import make_vision_model
from tests.vision_bases import segments_of, vision_base


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A number for each pass of a tower; the cache folder is the test's own."""
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    seen: list[int] = []
    look = Tower._look  # pyright: ignore[reportPrivateUsage]

    def counted(self: Tower, given: Any, segment: int, batch: Any, tower_pass: Any) -> Any:
        if type(self) is Tower:  # a memory plan's looks at blank pictures
            seen.append(segment)
        return look(self, given, segment, batch, tower_pass)

    monkeypatch.setattr(Tower, "_look", counted)
    return seen


def settings(world: Path, out: Path, **model: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(world / "model"), "dtype": "float32", "device": "cpu", **model},
        "data": {"train": [str(world / "mllm.json")], "batch_size": 3},
        "output_dir": str(out),
        "ignore_memory_plan": True,
        "num_train_epochs": 2,
        "jobs": [{"name": "a", "adapter": {"rank": 2, "dropout": 0.1}}, {"name": "b", "adapter": {"rank": 4}}],
    }


def notices(recorder: Any) -> list[str]:
    return [each.text for each in recorder.events if isinstance(each, Notice)]


def test_two_epochs_of_two_jobs_look_once_and_learn_the_same_bits(
    world: Path, tmp_path: Path, passes: list[int]
) -> None:
    _, plain = run(settings(world, tmp_path / "plain"))
    without = len(passes)
    passes.clear()
    _, cached = run(settings(world, tmp_path / "cached", cache_vision_features=True))
    computing = len(passes)
    passes.clear()
    _, again = run(settings(world, tmp_path / "again", cache_vision_features=True))
    tried_out = len(passes)
    assert computing == tried_out + 3  # one picture twice in a document, and two alone
    looks = without - tried_out
    assert 3 < looks <= 2 * 6  # two epochs of six documents, for both jobs together
    assert again.losses("a") == plain.losses("a")
    for job in ("a", "b"):
        assert cached.losses(job) == plain.losses(job)
        assert len(cached.losses(job)) == 4
    (last,) = (text for text in notices(cached) if "read in this run" in text)
    assert "cached vision features: 3 entries" in last
    assert f"; 3 computed and {looks - 3} read in this run" in last


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_vl"])
def test_an_entry_has_the_form_and_the_bits_of_the_pass(family: str, tmp_path: Path, passes: list[int]) -> None:
    """Tensors, pieces of one tensor, and lists of such."""
    base, tokenizer, _ = vision_base(tmp_path / "model", family, dtype="float32")
    segments = segments_of(write_picture_rows(tmp_path), tokenizer)
    batch = base.media_encoder.ready(pack([(-1, segment) for segment in segments[:3]]))
    expected = base.hidden(batch)
    found: list[str] = []
    for number in range(2):  # written, then read by another run
        base.media_encoder.feature_cache = cache = FeatureCache(tmp_path / "cache" / "one", found.append)
        passes.clear()
        assert torch.equal(base.hidden(batch), expected)
        assert (cache.computed, cache.read) == ((3, 0), (0, 3))[number]
        assert len(passes) == cache.computed
    entries = sorted((tmp_path / "cache" / "one").iterdir())
    assert len(entries) == 3  # nothing temporary stays
    content = bytearray(entries[0].read_bytes())
    content[-1] ^= 1
    entries[0].write_bytes(content)
    entries[1].write_bytes(entries[1].read_bytes()[:-7])
    for number in range(2):  # computed again, reported once, and written again
        base.media_encoder.feature_cache = cache = FeatureCache(tmp_path / "cache" / "one", found.append)
        assert torch.equal(base.hidden(batch), expected)
        assert (cache.computed, cache.read) == ((2, 1), (0, 3))[number]
    assert len(found) == 1
    assert "is damaged" in found[0]


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    base, tokenizer, _ = vision_base(tmp_path / "model", "llava", dtype="float32")
    segments = segments_of(write_picture_rows(tmp_path), tokenizer)
    batch = base.media_encoder.ready(pack([(-1, segment) for segment in segments[:3]]))
    expected = base.hidden(batch)
    (tmp_path / "file").write_text("")
    found: list[str] = []
    base.media_encoder.feature_cache = FeatureCache(tmp_path / "file" / "below", found.append)
    assert torch.equal(base.hidden(batch), expected)
    assert len(found) == 1
    assert "cannot be written" in found[0]


def test_entries_are_of_one_tower() -> None:
    """Any weight beside the language model makes another one, its own weights do not."""
    model = make_vision_model("llava")
    first = tower_digest(model)
    assert tower_digest(make_vision_model("llava")) == first
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
        assert tower_digest(model) == first
        for part in (model.model.vision_tower, model.model.multi_modal_projector):
            weight = next(part.parameters())
            before = weight.clone()
            weight.view(-1)[0] += 1
            assert tower_digest(model) != first
            weight.copy_(before)
    assert tower_digest(model) == first


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"adapter": {"freeze_vision_tower": False}}, "adapter.freeze_vision_tower: false trains what features are"),
        ({"adapter": {"freeze_multi_modal_projector": False}}, "adapter.freeze_multi_modal_projector: false trains"),
        ({"tuning": "full"}, "model.cache_vision_features: tuning: full trains the base's own parameters"),
        ({"base": "sharded"}, "model.cache_vision_features: with base: sharded no device has the whole tower"),
    ],
)
def test_a_tower_that_changes_is_refused_before_it_loads(changes: dict[str, Any], problem: str) -> None:
    given = {"model": {"path": "nowhere", "cache_vision_features": True}, "data": {"train": "x.json"}}
    with pytest.raises(ConfigError) as caught:
        validate_settings({**given, "output_dir": "out", **changes})
    assert f"  - {problem}" in str(caught.value)


def test_an_expression_that_reaches_the_tower_is_refused_before_the_first_step(
    world: Path, tmp_path: Path, passes: list[int]
) -> None:
    given = settings(world, tmp_path / "run", cache_vision_features=True)
    given["jobs"] = [{"name": "a", "adapter": {"rank": 2, "target_modules": r".*visual.*\.(qkv|proj)|.*q_proj"}}]
    with pytest.raises(ModelError, match="the adapter of job a reaches the tower or the projector"):
        train(RunConfig(**given))
