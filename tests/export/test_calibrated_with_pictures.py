"""What few bits are chosen by: rows with their pictures, as the model that was trained saw them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowrank.export.gguf.convert import plan
from lowrank.export.gguf.importance import measure
from lowrank.export.gguf.model import read_merged
from lowrank.export.merge.merged import Merged
from lowrank.export.merge.tensor_names import Names
from lowrank.export.quantize.calibration import quantize_in_order
from lowrank.export.source import Source
from lowrank.export.targets.gptq import GPTQExportConfig
from lowrank.export.verify.held_out import beginning
from lowrank.models.checks.media_isolation import _alone
from lowrank.models.layers import decoder_layers
from lowrank.models.tower import Tower
from lowrank.pipelines.export_source import open_source
from lowrank.segments import Media, Segment, unweighted
from tests.picture_rows import write_picture_rows
from tests.vision_bases import segments_of, vision_base


def world(folder: Path, family: str) -> tuple[Any, Source, list[Segment]]:
    """(the base, itself as a source, rows with pictures and a text)."""
    base, tokenizer, _ = vision_base(folder / "base", family, "float32")
    segments = segments_of(write_picture_rows(folder), tokenizer)
    documents = [beginning(each) for each in (segments[0], segments[1], segments[-1])]
    source = open_source(str(folder / "base"), notify=lambda text: None).source
    model = source.model.model_copy(update={"dtype": "float32", "device": "cpu"})
    return base, replace(source, model=model, documents=lambda count: documents), documents


def inputs_in(base: Any, names: list[str], documents: list[Segment]) -> dict[str, torch.Tensor]:
    """(T, D) of each linear, of transformers' model with each document alone."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        base.model.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: seen[name].append(given[0][0])
        )
        for name in names
    ]
    for document in documents:
        _alone(base, document)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) for name, found in seen.items()}


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llava"])
def test_layers_are_calibrated_on_what_the_tower_says(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer too, behind what Qwen3-VL adds between layers; the tower looks at each document once."""
    base, source, documents = world(tmp_path, family)
    looks: list[int] = []
    look = Tower._look

    def counted(tower: Tower, given: Any, segment: int, batch: Any, tower_pass: Any) -> Any:
        looks.append(len(batch.lengths))
        return look(tower, given, segment, batch, tower_pass)

    monkeypatch.setattr(Tower, "_look", counted)
    merged = Merged(source)
    model = Names(source.base, merged.checkpoint).model
    stack = decoder_layers(model)
    assert stack is not None
    inside = {module for layer in stack for module in layer.modules()}
    own = [name for name, module in model.named_modules() if module in inside]
    names = [name for name in own if name.endswith(("q_proj", "up_proj"))]
    assert len(names) == 2 * len(stack) > 2
    found: dict[str, torch.Tensor] = {}

    def kept(name: str, weight_OD: torch.Tensor, moment_DD: torch.Tensor | None) -> torch.Tensor:
        assert moment_DD is not None
        found[name] = moment_DD
        return weight_OD

    quantize_in_order(source, merged, names, documents, kept, lambda done, of: None)
    assert looks.count(1) == 2, "one of each document; those of the load test come together"
    for name, x_TD in inputs_in(base, names, documents).items():
        torch.testing.assert_close(found[name], x_TD.t() @ x_TD / len(x_TD), rtol=1e-4, atol=1e-5)


def test_importance_is_measured_with_pictures(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    base, source, documents = world(tmp_path, "llava")
    (tmp_path / "side").mkdir()
    made = plan(read_merged(source, tmp_path / "side"))
    found = measure(source, made, documents)
    name = "model.language_model.layers.1.self_attn.q_proj"
    x_TD = inputs_in(base, [name], documents)[name]
    np.testing.assert_allclose(found["blk.1.attn_q.weight"], x_TD.square().mean(0).numpy(), rtol=1e-4)


def test_it_is_said(tmp_path: Path) -> None:
    _, source, _ = world(tmp_path, "llava")
    (note,) = GPTQExportConfig(bits=8).build().needs(source).notes
    assert "calibrated on 3 documents" in note
    assert "2 of the documents with their pictures, videos or sounds" in note


def test_a_beginning_has_whole_pictures_and_as_much_text() -> None:
    media = Media((None, None), ((10, 910), (920, 1820)))  # type: ignore[arg-type]
    whole = Segment(np.arange(4000), np.zeros(4000, np.float32), media=media)
    found = beginning(whole)
    assert len(found) == 2048
    assert found.media is not None
    assert len(found.media.spans) == 2
    longer = replace(whole, media=Media((None, None), ((10, 910), (920, 2220))))  # type: ignore[arg-type]
    cut = beginning(longer)
    assert (len(cut), cut.media and cut.media.spans) == (920, ((10, 910),))
    assert len(beginning(unweighted(np.arange(4000)))) == 512
    assert len(beginning(unweighted(np.arange(40)))) == 40
