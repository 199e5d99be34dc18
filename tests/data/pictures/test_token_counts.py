"""How many tokens stand for a picture: counted without decoding it, reported, and never cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowrank.data.chat.truncation import split, truncate
from lowrank.media.decoding import decoded, examine
from lowrank.media.processor import MediaProcessor, processor_of
from lowrank.models.config import ModelConfig
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.segments import Media, Segment
from tests.data.pictures.rows import as_bytes, chat, noise, read
from tests.tiny_vision_models import VISION_MODELS, as_parameters, save_vision_folder


def test_the_report_counts_them_and_their_tokens(tokenizer: Any, folder: Path) -> None:
    rows = [{"messages": chat("<image>?"), "images": [f"pictures/{number}.png"]} for number in (0, 1, 0)]
    report = read(tokenizer, folder, *rows).report
    (dataset,) = report.datasets
    assert dataset.pictures == 3
    assert 9 <= dataset.picture_tokens <= 60
    sentence = f"3 pictures in 3 rows, 2 of them different; {dataset.picture_tokens} of all"
    assert any(sentence in text for text in report.information)
    assert any("1 row (row 3) repeated" in text for text in report.information)
    other = [{"messages": chat("<image>?"), "images": [f"pictures/{number}.png"]} for number in (0, 1)]
    assert not any("repeated" in text for text in read(tokenizer, folder, *other).report.information)


@pytest.mark.parametrize("family", as_parameters(sorted(VISION_MODELS)))
def test_counts_without_decoding_are_those_of_the_processor(family: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(save_vision_folder(tmp_path, family)), image_max_pixels=64 * 64))
    processor = processor_of(tokenizer)
    assert processor is not None
    for sizes in ([(40, 24)], [(40, 24), (17, 90)], [(200, 150)], [(9, 9)], [(1, 1)]):
        pictures = [examine(as_bytes(noise(size)), "") for size in sizes]
        images = [decoded(each, processor.limits.of_picture(each.width, each.height)) for each in pictures]
        text = " ".join([processor.placeholder("image")] * len(images))
        ids = processor.own(images=[images], text=[text], add_special_tokens=False)["input_ids"][0]
        counted = processor.placeholders(pictures)
        written = tokenizer(" ".join(counted), add_special_tokens=False)["input_ids"]
        if family == "paligemma":  # whose processor puts pictures first, and ends what comes behind them
            (image,) = tokenizer(processor.placeholder("image"), add_special_tokens=False)["input_ids"]
            written, ids = ([each for each in row if each == image] for row in (written, ids))
        assert written == list(ids)


@pytest.mark.parametrize("family", as_parameters(sorted(VISION_MODELS)))
def test_a_processor_tells_whether_limits_of_pixels_change_its_counts(family: str, tmp_path: Path) -> None:
    """As what it makes of pictures that are made smaller first, and of such that are not."""
    path = str(save_vision_folder(tmp_path, family))
    few = processor_of(load_tokenizer(ModelConfig(path=path, image_max_pixels=5 * 5, image_min_pixels=1)))
    all_of_them = processor_of(load_tokenizer(ModelConfig(path=path, image_max_pixels=10**9, image_min_pixels=1)))
    assert few is not None
    assert all_of_them is not None
    for size in ((20, 10), (8, 8), (24, 24), (40, 24), (90, 17)):
        picture = examine(as_bytes(noise(size)), "")
        alike = few.placeholders([picture]) == all_of_them.placeholders([picture])
        assert few.counts_as_served(picture) == alike, size
        assert all_of_them.counts_as_served(picture)
    if family in ("qwen2_5_vl", "llava_onevision"):
        assert not few.counts_as_served(examine(as_bytes(noise((40, 24))), ""))


@pytest.mark.parametrize(("family", "differs"), [("llava_onevision", True), ("llava", False)])
def test_pictures_of_other_counts_than_where_they_are_served_are_said(
    family: str, differs: bool, tmp_path: Path, folder: Path
) -> None:
    path = str(save_vision_folder(tmp_path / "m", family))
    tokenizer = load_tokenizer(ModelConfig(path=path, image_max_pixels=5 * 5, image_min_pixels=1))
    rows = [{"messages": chat("<image>?"), "images": [f"pictures/{number}.png"]} for number in (0, 1)]
    report = read(tokenizer, folder, *rows).report
    texts = [text for text in report.information if "than where the model's own processor is shown them" in text]
    assert [("2 pictures stand for another number" in text and "rows.jsonl" in text) for text in texts] == [
        True
    ] * differs


def test_pixels_have_limits_as_llama_factory_sets_them(tokenizer: Any) -> None:
    limits = MediaProcessor("nowhere", None, tokenizer).limits
    assert limits.of_picture(1200, 900) == (886, 665)  # int() of both, as there
    assert limits.of_picture(10, 20) == (22, 45)
    assert limits.of_picture(640, 480) == (640, 480)
    assert limits.of_frame(640, 480) == (295, 221)


def test_no_cut_falls_into_a_picture() -> None:
    pictures = tuple(examine(as_bytes(noise(seed=number)), "") for number in range(3))
    spans = ((4, 10), (14, 20), (20, 26))
    weights = np.zeros(36, np.float32)
    weights[[2, 11, 12, 27, 28, 30, 31]] = 1.0
    whole = Segment(np.arange(36), weights, media=Media(pictures, spans))
    for limit in range(1, 40):
        cut, lost = truncate(whole, limit)
        if cut is not None:
            assert len(cut) <= limit
            assert len(cut) + lost == 36
            kept = cut.media.spans if cut.media else ()
            assert kept == tuple(span for span in spans if span[1] <= len(cut))
            assert all(not start < len(cut) < end for start, end in spans)
        pieces = split(whole, limit, np.zeros(0, np.int64))
        learned = [token for piece in pieces for token in piece.token_L[piece.weight_L > 0]]
        assert not pieces or learned == [2, 11, 12, 27, 28, 30, 31]
        for piece in pieces:
            assert len(piece) <= limit
            media = piece.media
            of_pictures = [t for t in piece.token_L.tolist() if any(start <= t < end for start, end in spans)]
            inside = [
                token for start, end in (media.spans if media else ()) for token in piece.token_L[start:end].tolist()
            ]
            assert of_pictures == inside
            if media:
                shown = [spans[media.before + index][0] for index in range(len(media.spans))]
                assert [piece.token_L[start] for start, _ in media.spans] == shown
    assert pieces
