"""Reference log-probabilities: the bare base's own, once, on disk by content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import BASE_SLOT
from lowrank.segments import Segment
from lowrank.train.engine import Engine
from lowrank.train.reference import References, digest_of_model
from tests.tiny_models import make_base, make_engine, make_model, random_step


def trained_engine(family: str = "llama", micro_batch_tokens: int = 30, **changes: object) -> Engine:
    """Its adapter is away from its start, so that it would show."""
    engine, (slot,) = make_engine(
        make_base(family, **changes), LoraConfig(rank=4), micro_batch_tokens=micro_batch_tokens
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in engine.bank.parameters(slot).values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return engine


def by_transformers(segment: Segment) -> np.ndarray:
    """From the whole logits of a fresh copy of the model, no adapter anywhere near."""
    model = make_model("llama")
    token_1L = torch.from_numpy(segment.token_L)[None]
    with torch.no_grad():
        logprob_LV = model(token_1L).logits[0].log_softmax(-1)
    own_L = logprob_LV[:-1].gather(1, token_1L[0, 1:, None])[:, 0]
    return np.concatenate([[0.0], own_L.numpy()]) * (segment.weight_L != 0)


def test_they_are_the_bare_bases_own(tmp_path: Path) -> None:
    engine = trained_engine()
    segments = random_step(0, [5, 12, 9, 30, 17])
    references = References(engine, tmp_path)
    references.prepare(segments)
    for segment, attached in zip(segments, references.attach(segments)):
        assert attached.reference_L is not None
        assert attached.reference_L.dtype == np.float32
        np.testing.assert_allclose(attached.reference_L, by_transformers(segment), atol=1e-6)
        assert attached.origin == segment.origin
    with_adapter = engine.logprobs(0, segments)
    assert np.abs(with_adapter[1] - references.attach(segments)[1].reference_L).max() > 1e-3


def test_found_on_disk_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank.train.reference._SEGMENTS_PER_FILE", 3)
    engine, segments = trained_engine(), random_step(0, [5, 12, 9, 30, 17, 4, 8])
    first = References(engine, tmp_path)
    reported: list[tuple[int, int]] = []
    first.prepare([*segments, *segments], lambda done, total, left: reported.append((done, total)))
    assert (first.num_computed, first.num_found) == (7, 0)  # each once
    assert reported == [(3, 7), (6, 7), (7, 7)]
    again = References(trained_engine(), tmp_path)
    monkeypatch.setattr(Engine, "logprobs", None)  # nothing may be computed any more
    again.prepare(segments)
    assert (again.num_computed, again.num_found) == (0, 7)
    for one, other in zip(first.attach(segments), again.attach(segments)):
        np.testing.assert_array_equal(one.reference_L, other.reference_L)  # type: ignore[arg-type]
    monkeypatch.undo()
    monkeypatch.setattr("lowrank.train.reference._SEGMENTS_PER_FILE", 3)
    longer = References(trained_engine(), tmp_path)
    longer.prepare([*segments, *random_step(9, [6])])  # rows were appended
    assert (longer.num_computed, longer.num_found) == (2, 6)


def test_other_weights_other_masks_and_damage_are_not_taken(tmp_path: Path) -> None:
    segments = random_step(0, [5, 12])
    References(trained_engine(), tmp_path).prepare(segments)
    masked = [replace(segment, weight_L=np.roll(segment.weight_L, 1)) for segment in segments]
    for engine, requested in ((trained_engine(), masked), (trained_engine(initializer_range=0.05), segments)):
        references = References(engine, tmp_path)
        references.prepare(requested)
        assert (references.num_computed, references.num_found) == (2, 0)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-3])
    references = References(trained_engine(), tmp_path)
    references.prepare(segments)
    assert (references.num_computed, references.num_found) == (2, 0)


def test_a_cache_that_cannot_be_written_is_said_and_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    references = References(trained_engine(), tmp_path / "file")
    references.prepare(random_step(0, [5, 12]))
    assert references.problem is not None
    assert "cannot be written" in references.problem
    assert references.num_computed == 2


def test_the_digest_sees_weights_and_not_adapters() -> None:
    plain = digest_of_model(make_base("llama").model)
    engine = trained_engine()
    assert digest_of_model(engine.base.model) == plain
    with torch.no_grad():
        for parameter in engine.base.model.parameters():
            parameter.mul_(1.001)
    assert digest_of_model(engine.base.model) != plain


def test_unprepared_segments_are_computed_on_the_fly() -> None:
    """As a stream needs; nothing piles up."""
    references = References(trained_engine(), None)
    segments = random_step(0, [5, 12])
    (attached, _), _ = references.attach(segments), references.attach(random_step(1, [40]))
    assert attached.reference_L is not None
    assert not references._known
    np.testing.assert_array_equal(attached.reference_L, trained_engine().logprobs(BASE_SLOT, segments)[0])
