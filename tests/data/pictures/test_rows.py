"""Rows with pictures: read from every way people write them, looked at without a model, and refused by name."""

from __future__ import annotations

import base64
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lowrank.cli.main import main
from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.prepare import prepare
from lowrank.data.sources.hub import folder_of_files
from lowrank.data.sources.memory import keep_rows
from lowrank.errors import DataError, ModelError
from lowrank.media.decoding import decoded, examine
from lowrank.media.torchvision import torchvision_problem
from lowrank.models.config import ModelConfig
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.records import Conversation, Preference, Text
from tests.data.pictures.rows import as_bytes, chat, digests, noise, of_files, read, url
from tests.tiny_composites import IMAGE
from tests.tiny_vision_models import save_vision_folder


def test_every_way_to_write_them(tokenizer: Any, folder: Path) -> None:
    raw = url(folder, 0).partition(",")[2]
    place = {"type": "image"}
    text = {"type": "text", "text": "What is it?"}
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}]
    rows = [
        {"messages": chat("<image>What is it?"), "images": ["pictures/0.png"]},
        {"instruction": "<image>What is it?", "output": "A cat.", "images": ["pictures/0.png"]},
        {"conversations": turns, "images": ["pictures/0.png"]},
        {"conversations": turns, "image": "pictures/0.png"},
        {"messages": chat([place, text]), "images": ["pictures/0.png"]},
        {"messages": chat("What is it?"), "images": ["pictures/0.png"]},
        {"prompt": chat("What is it?")[:1], "completion": chat("")[1:], "image": "pictures/0.png"},
        {"messages": chat([{"type": "image_url", "image_url": {"url": url(folder, 0)}}, text])},
        {"messages": chat([{"type": "image", "image": "pictures/0.png"}, text])},
        {"messages": chat([{"type": "image", "path": "pictures/0.png"}, text])},
        {"messages": chat([{"type": "image", "base64": raw}, text])},
        {"messages": chat("<image>What is it?"), "image": {"bytes": raw, "path": None}},
        {"messages": chat("<image>What is it?"), "images": [raw]},
        {"messages": chat("<image>"), "images": ["pictures/0.png"]},
        {"messages": chat([place]), "images": ["pictures/0.png"]},
    ]
    for row in rows:
        found = read(tokenizer, folder, row)
        assert digests(found) == [of_files(folder, 0)], row
        (segment,) = found.train.samples[0]
        ((first, end),) = segment.media.spans  # type: ignore[union-attr]
        assert (segment.token_L[first:end] == IMAGE).all()
        assert (segment.token_L == IMAGE).sum() == end - first > 3
        assert not segment.weight_L[first:end].any()
        assert segment.weight_L.sum() == len("A cat.") + 1


def test_many_pictures_keep_their_order_and_places(tokenizer: Any, folder: Path) -> None:
    turns = [*chat("<image>a<image>b", "x"), *chat("c<image>", "y"), *chat("d", "z")]
    found = read(tokenizer, folder, {"messages": turns, "images": [f"pictures/{n}.png" for n in (2, 0, 1)]})
    assert digests(found) == [of_files(folder, 2, 0, 1)]
    shown = "".join(text for text, _ in found.report.shown[0])
    shown = re.sub(r"<\|vision_start\|>\[picture (\d+) x 24: \d+ tokens\]<\|vision_end\|>", r"[\1]", shown)
    assert "user\n[56]a[40]b<|im_end|>" in shown
    assert "user\nc[48]<|im_end|>" in shown
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    template = tokenizer.chat_template
    tokenizer.chat_template = "{{ tools or '' }}" + template
    try:
        both = read(tokenizer, folder, {"messages": chat("<image>?"), "images": ["pictures/0.png"], "tools": tools})
    finally:
        tokenizer.chat_template = template
    assert digests(both) == [of_files(folder, 0)]


def test_rows_in_memory_hold_pictures_of_pillow_and_bytes(tokenizer: Any, folder: Path) -> None:
    image = Image.open(folder / "pictures" / "1.png")
    rows = [
        {"messages": chat("<image>?"), "images": [image]},
        {"messages": chat([{"type": "image", "image": image}, {"type": "text", "text": "?"}])},
        {"messages": chat("<image>?"), "image": {"bytes": (folder / "pictures" / "1.png").read_bytes(), "path": None}},
    ]
    config = DataConfig(train=(keep_rows(rows),), shuffle=False)
    found = prepare(config, tokenizer=tokenizer, record=Conversation, seed=0)
    shown = [decoded(sample[0].media.items[0]) for sample in found.train.samples]  # type: ignore[union-attr]
    assert all(np.array_equal(np.asarray(each), np.asarray(image)) for each in shown)


@pytest.mark.parametrize("streamed", [False, True])
def test_datasets_of_datasets_give_the_files_they_hold(streamed: bool, tokenizer: Any, folder: Path) -> None:
    """And not what they would decode them to: the same bytes, in the memory they take."""
    import datasets

    exif = Image.Exif()
    exif[0x0112] = 6
    photograph = as_bytes(noise((300, 200)), "JPEG", exif=exif)
    path = folder / "photograph.jpg"
    path.write_bytes(photograph)
    one, several = datasets.Features({"image": datasets.Image()}), {"images": datasets.List(datasets.Image())}
    turns = {"messages": chat("<image>?")}
    held = {"path": None, "bytes": photograph}
    rows: list[tuple[Any, dict[str, Any]]] = [
        (one, {"image": held}),
        (one, {"image": str(path)}),
        (several, {"images": [held]}),
    ]
    both: Any = None
    for features, row in rows:
        text = datasets.Dataset.from_list([turns])
        given = datasets.Dataset.from_list([row], features=datasets.Features(features))
        both = datasets.concatenate_datasets([text, given], axis=1)
        kept = keep_rows(both.to_iterable_dataset() if streamed else both)
        config = DataConfig(train=(kept,), shuffle=False)
        found = prepare(config, tokenizer=tokenizer, record=Conversation, seed=0)
        (media,) = digests(found)
        assert media == [examine(photograph, "").digest]
        assert isinstance(both[0][next(iter(row))], (Image.Image, list))  # the person's own is as it was
    shown = both.with_transform(lambda batch: batch)
    assert len(keep_rows(shown)._held) == 1  # pyright: ignore[reportPrivateUsage]


def test_rows_of_the_hub_reach_no_file_of_this_machine(
    tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what `datasets` has put into its own folder."""
    import datasets

    monkeypatch.setattr("lowrank.data.sources.hub.unreachable", lambda path, kind: None)
    monkeypatch.setattr("lowrank.data.sources.rows.folder_of_files", lambda: (folder, ("pictures", "hub")))
    outside = folder / "outside.png"  # as a token lies in HF_HOME, beside the caches
    noise(seed=7).save(outside)
    data = outside.read_bytes()
    inside = folder / "pictures" / "0.png"
    values = [
        {"path": None, "bytes": data},
        {"path": str(inside), "bytes": None},
        {"path": str(outside), "bytes": None},
    ]
    rows = [{"messages": chat("<image>?"), "image": each} for each in values]
    turns = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
    features = datasets.Features({"messages": turns, "image": datasets.Image()})
    given = datasets.Dataset.from_list(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **named: given)
    config = DataConfig(train=(SourceConfig(path="somebody/pictures"),), shuffle=False)
    found = prepare(config, tokenizer=tokenizer, record=Conversation, seed=0)
    assert digests(found) == [[examine(data, "").digest], *([each] for each in of_files(folder, 0))]
    (loss,) = found.report.losses
    assert "a picture outside of the data's folder" in loss


def test_rows_of_the_hub_are_kept_from_the_token_beside_its_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    from huggingface_hub import constants

    for caches, expected in ((("home/hub", "home/x/y"), ("home", ("hub", "x"))), (("far", "home/x"), ("home/x", ()))):
        for module, name, value in (
            (constants, "HF_HOME", "home"),
            (constants, "HF_HUB_CACHE", caches[0]),
            (datasets.config, "HF_DATASETS_CACHE", caches[1]),
        ):
            monkeypatch.setattr(module, name, f"/{value}")
        assert folder_of_files() == (Path("/", expected[0]), expected[1])


def test_a_typed_placeholder_is_text(tokenizer: Any, folder: Path) -> None:
    row = {"messages": chat("<image>What is <|image_pad|>?"), "images": ["pictures/0.png"]}
    with pytest.raises(DataError, match=r"<\|image_pad\|> stands in it.*write <image> there"):
        read(tokenizer, folder, row)
    row = {"messages": chat("<image>What?", "It is <|vision_start|>."), "images": ["pictures/0.png"]}
    (segment,) = read(tokenizer, folder, row).train.samples[0]
    ((first, end),) = segment.media.spans  # type: ignore[union-attr]
    assert (segment.token_L == IMAGE).sum() == end - first


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"messages": chat("<image><image>?"), "images": ["pictures/0.png"]}, "2 .* for 1 in column 'images'"),
    ({"messages": chat("<image>?"), "images": ["pictures/0.png"] * 2}, "1 .* for 2 in column 'images'"),
    ({"messages": chat("<image>?")}, "1 .* for 0 in no column of images"),
    ({"messages": chat("?", "<image>"), "images": ["pictures/0.png"]}, "a picture in an answer"),
    (
        {"messages": chat("<image>?"), "images": ["http://a.b/c.png"]},
        "a picture behind a URL.*nothing is fetched unless you say so",
    ),
    ({"messages": chat("<image>?"), "images": ["../secret.png"]}, "outside of the data's folder.*media_dir"),
    ({"messages": chat("<image>?"), "images": ["/etc/passwd"]}, "outside of the data's folder"),
    ({"messages": chat("<image>?"), "images": ["file:///etc/passwd"]}, "outside of the data's folder"),
    ({"messages": chat("<image>?"), "images": ["a\0b"]}, "zero byte"),
    ({"messages": chat("<image>?"), "images": [7]}, "wrong type for images"),
    ({"messages": chat("<image>?"), "images": ["data:image/png;base64,%%%"]}, "its base64 cannot be read"),
    ({"messages": chat("<image>?"), "images": ["data:text/html;base64,AAAA"]}, "is no data:image"),
    ({"text": "See.", "images": ["pictures/0.png"]}, "plain text has no turn"),
]


@pytest.mark.parametrize(
    ("row", "problem"), BAD_ROWS, ids=lambda value: str(value)[:50] if isinstance(value, str) else ""
)
def test_bad_rows_are_named(row: dict[str, Any], problem: str, tokenizer: Any, folder: Path) -> None:

    with pytest.raises(DataError, match=problem):
        read(tokenizer, folder, row, record=Text if "text" in row else Conversation)


def test_media_dir_is_another_root(tokenizer: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    noise(seed=9).save(tmp_path / "elsewhere" / "9.png")
    row = {"messages": chat("<image>?"), "images": ["9.png"]}
    assert digests(read(tokenizer, folder, row, media_dir=str(tmp_path / "elsewhere")))
    row["images"] = [str(tmp_path / "elsewhere" / "9.png")]
    assert digests(read(tokenizer, folder, row, media_dir=str(tmp_path)))
    with pytest.raises(DataError, match="outside of the data's folder"):
        read(tokenizer, folder, row)


STRANGE: dict[str, dict[str, Any]] = {
    "a JPEG that ends in FF": {
        "messages": chat("<image>?"),
        "images": [
            "data:image/jpeg;base64," + base64.b64encode(as_bytes(noise(), "JPEG")[:-2] + b"\xff" * 60_000).decode()
        ],
    },
    "blanks behind base64": {"messages": chat("<image>?"), "images": ["A" * 256 + " " * 60_000 + "!"]},
    "tags that nobody closes": {"messages": chat("<audio>" * 16_000)},
}


@pytest.mark.parametrize("name", STRANGE)
def test_rows_of_strangers_take_no_time_that_grows_with_their_square(name: str, tokenizer: Any, folder: Path) -> None:
    """Each of these took ten seconds and more, and a file of some megabytes hours."""
    began = time.process_time()
    with pytest.raises(DataError, match="row 1"):
        read(tokenizer, folder, STRANGE[name])
    assert time.process_time() - began < 4


@pytest.mark.parametrize("tokens", [True, False])
def test_without_a_model_they_are_looked_at_and_counted(
    tokens: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line, where --media-dir is what `media_dir` is in settings."""
    if not tokens:
        monkeypatch.setattr("lowrank.cli.data._tokenizer", lambda model, config: (None, "in characters"))
    (tmp_path / "far").mkdir()
    rows = [{"messages": chat("<image>What?"), "images": [name]} for name in ("0.png", "1.png", "0.png")]
    rows += [{"messages": chat("<image>"), "images": ["2.png"]}, {"messages": chat("<image>?"), "images": ["bad.png"]}]
    path = tmp_path / "far" / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "pictures" / "bad.png").write_bytes(as_bytes(noise())[:-9])
    found = command(capsys, "data", str(path), "--json", "--media-dir", str(folder / "pictures"))
    (dataset,) = json.loads(found)["reports"][0]["datasets"]
    assert (dataset["used"], dataset["pictures"], dataset["picture_tokens"]) == (4, 4, 0)
    assert dataset["dropped"][0]["rows"] == ["row 5"]
    assert "bad.png is cut off" in dataset["dropped"][0]["example"]
    (note,) = [each for each in dataset["notes"] if "4 pictures in 4 rows, 3 of them different" in each]
    assert "how many tokens stand for them, a model with a tower tells (--model)" in note
    nowhere = command(capsys, "data", str(path), "--media-dir", str(tmp_path / "none"), code=3)
    assert "media_dir: there is no folder" in nowhere
    missing = command(capsys, "data", str(path), code=3)
    assert "--media-dir" in missing


def command(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    output = capsys.readouterr()
    assert caught.value.code == code, output
    return " ".join((output.out + output.err).split())


def test_preferences_show_the_prompts_pictures_to_both_answers(tokenizer: Any, folder: Path) -> None:
    row = {"prompt": "<image>What?", "chosen": "A cat.", "rejected": "A dog.", "images": ["pictures/0.png"]}
    (sample,) = read(tokenizer, folder, row, record=Preference).train.samples
    assert [segment.media and segment.media.spans for segment in sample] == [sample[0].media.spans] * 2  # type: ignore[union-attr]


def test_a_base_without_eyes_says_so(folder: Path, tmp_path: Path) -> None:
    from tests.checkpoint_folder import save_checkpoint_folder

    text_only = load_tokenizer(ModelConfig(path=str(save_checkpoint_folder(tmp_path / "text"))))
    with pytest.raises(DataError, match="this base reads text only"):
        read(text_only, folder, {"messages": chat("<image>?"), "images": ["pictures/0.png"]})


def test_a_template_that_loses_pictures_is_refused(tokenizer: Any, folder: Path) -> None:
    row = {"messages": chat("<image>What?"), "images": ["pictures/0.png"]}
    with pytest.raises(DataError, match=r"leaves out|shows 0 places of pictures|cannot render"):
        read(tokenizer, folder, row, chat_template="chatml")


@pytest.mark.parametrize(
    ("kind", "way_out"),
    [
        ("Nonesuch", "get them again from where the model is from"),
        pytest.param(
            "Cohere2VisionImageProcessor",  # transformers has it on torchvision alone
            "[Tt]orchvision.*`pip install torchvision`",
            marks=pytest.mark.skipif(torchvision_problem() is None, reason="torchvision is here"),
        ),
    ],
)
def test_a_processor_that_cannot_be_made_is_an_error_of_the_model(
    kind: str, way_out: str, folder: Path, tmp_path: Path
) -> None:
    path = save_vision_folder(tmp_path / "m", "llava")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (path / name).write_text(json.dumps({"image_processor_type": kind, "processor_class": "LlavaProcessor"}))
    tokenizer = load_tokenizer(ModelConfig(path=str(path)))
    with pytest.raises(ModelError, match=f"processor of pictures.*{way_out}"):
        read(tokenizer, folder, {"messages": chat("<image>What?"), "images": ["pictures/0.png"]})


def test_tokenized_data_holds_no_pictures(tokenizer: Any, folder: Path) -> None:
    row = {"messages": chat("<image>What?"), "images": ["pictures/0.png"]}
    with pytest.raises(DataError, match="tokenized_path: rows with pictures"):
        read(tokenizer, folder, row, tokenized_path=str(folder / "kept"))
