"""Rows with pictures: read from every way people write them, shown upright, counted, and refused by name."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lowrank.cli.main import main
from lowrank.data.chat.truncation import split, truncate
from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.prepare import Prepared, prepare
from lowrank.data.sources.memory import keep_rows
from lowrank.errors import DataError, ModelError
from lowrank.media.decoding import BadPicture, decoded, examine
from lowrank.media.processor import MediaProcessor, processor_of
from lowrank.models.config import ModelConfig
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.records import Conversation, Preference, Text
from lowrank.segments import Media, Segment
from tests.fuzzing import mutated_bytes
from tests.tiny_composites import IMAGE
from tests.tiny_vision_models import VISION_MODELS, as_parameters, save_vision_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(ModelConfig(path=str(save_vision_folder(tmp_path_factory.mktemp("m") / "m", "qwen2_5_vl"))))


def noise(size: tuple[int, int] = (40, 24), mode: str = "RGB", seed: int = 0) -> Image.Image:
    value = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(value).convert(mode)


def as_bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    for number in range(3):
        noise((40 + 8 * number, 24), seed=number).save(tmp_path / "data" / "pictures" / f"{number}.png")
    return tmp_path / "data"


def read(tokenizer: Any, folder: Path, *rows: dict[str, Any], record: type = Conversation, **settings: Any) -> Prepared:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    media_dir = settings.pop("media_dir", None)
    source = SourceConfig(path=str(path), media_dir=media_dir)
    config = DataConfig(train=(source,), shuffle=False, **settings)
    return prepare(config, tokenizer=tokenizer, record=record, seed=0)


def digests(prepared: Prepared) -> list[list[str]]:
    return [[each.digest for each in sample[0].media.items] for sample in prepared.train.samples if sample[0].media]


def of_files(folder: Path, *numbers: int) -> list[str]:
    return [examine((folder / "pictures" / f"{number}.png").read_bytes(), "").digest for number in numbers]


def url(folder: Path, number: int) -> str:
    data = base64.b64encode((folder / "pictures" / f"{number}.png").read_bytes()).decode()
    return f"data:image/png;base64,{data}"


def chat(question: Any, answer: str = "A cat.") -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


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

    monkeypatch.setattr("lowrank.data.sources.hub._away", lambda path: None)
    monkeypatch.setattr("lowrank.data.sources.rows.folder_of_files", lambda: folder / "pictures")
    outside = folder / "outside.png"
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


def test_a_typed_placeholder_is_text(tokenizer: Any, folder: Path) -> None:
    row = {"messages": chat("<image>What is <|image_pad|>?"), "images": ["pictures/0.png"]}
    with pytest.raises(DataError, match=r"<\|image_pad\|> stands in it.*write <image> there"):
        read(tokenizer, folder, row)
    row = {"messages": chat("<image>What?", "It is <|vision_start|>."), "images": ["pictures/0.png"]}
    (segment,) = read(tokenizer, folder, row).train.samples[0]
    ((first, end),) = segment.media.spans  # type: ignore[union-attr]
    assert (segment.token_L == IMAGE).sum() == end - first


def png_of(width: int, height: int) -> bytes:
    """A header that promises so many pixels, and nothing behind it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
        + b"\0\0\0\0IEND\xaeB`\x82"
    )  # fmt: skip


BAD: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, r"a picture is missing: there is no file .*bad\.png; set `media_dir` of the dataset"),
    "text": (b"hello", r"not a picture: .*bad\.png is none of JPEG, PNG.* \(it begins with b'hello'\)"),
    "empty": (b"", r"not a picture: .*it is empty"),
    "truncated": (as_bytes(noise((200, 100)), "JPEG")[:-900], r"a broken picture: .*bad\.png is cut off"),
    "truncated png": (as_bytes(noise((200, 100)))[:-900], r"a broken picture: .*bad\.png is cut off"),
    "truncated behind a thumbnail": (
        as_bytes(noise((200, 100)), "JPEG", exif=b"Exif\0\0" + as_bytes(noise(), "JPEG"))[:-900],
        r"a broken picture: .*bad\.png is cut off: the end of its JPEG is missing",
    ),
    "truncated gif": (
        as_bytes(noise((200, 100)).convert("P"), "GIF")[:-900],
        r"a broken picture: .*bad\.png is cut off",
    ),
    "truncated bmp": (as_bytes(noise((200, 100)), "BMP")[:-900], r"a broken picture: .*bad\.png is cut off"),
    "truncated tiff": (as_bytes(noise((200, 100)), "TIFF")[:60_000], r"a broken picture: .*bad\.png is cut off"),
    "bomb": (png_of(60_000, 60_000), r"a picture too large: .*bad\.png says it has 3,600,000,000 pixels, 89,478,485"),
    "large": (png_of(12_000, 10_000), r"a picture too large: .*12,000 x 10,000 pixels"),
    "thin": (as_bytes(noise((6000, 2))), r"a picture too thin: .*bad\.png has 6,000 x 2 pixels; .*200 times"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_their_row(name: str, tokenizer: Any, folder: Path) -> None:
    data, problem = BAD[name]
    if data is not None:
        (folder / "bad.png").write_bytes(data)
    good = {"messages": chat("<image>What?"), "images": ["pictures/0.png"]}
    found = read(tokenizer, folder, good, {"messages": chat("<image>?"), "images": ["bad.png"]})
    (loss,) = found.report.losses
    assert "1 row (row 2) of 2 left out" in loss
    assert re.search(problem, loss), loss


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


def test_a_broken_middle_is_found_by_decoding(tokenizer: Any, folder: Path) -> None:
    data = bytearray(as_bytes(noise((200, 100))))
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    (folder / "bad.png").write_bytes(bytes(data))
    rows = [{"messages": chat("<image>?"), "images": [name]} for name in ("pictures/0.png", "bad.png")]
    assert not read(tokenizer, folder, *rows).report.losses
    (loss,) = read(tokenizer, folder, *rows, check_pictures="decode").report.losses
    assert "a broken picture" in loss
    assert "row 2" in loss


def test_what_is_shown_is_upright_and_opaque_and_eight_bits(tmp_path: Path) -> None:
    plain = noise((40, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = examine(as_bytes(plain, "PNG", exif=exif), "turned")
    assert (turned.width, turned.height) == (24, 40)
    assert np.array_equal(np.asarray(decoded(turned)), np.rot90(np.asarray(plain), -1))
    assert turned.notes == ("are turned as their EXIF says",)
    deep = np.asarray(plain.convert("L")).astype(np.uint16) * 257
    found = decoded(examine(as_bytes(Image.fromarray(deep)), "deep"))
    assert np.array_equal(np.asarray(found)[..., 0], np.asarray(plain.convert("L")))
    alpha = plain.convert("RGBA")
    alpha.putalpha(0)
    assert (np.asarray(decoded(examine(as_bytes(alpha), "clear"))) == 255).all()
    cmyk = examine(as_bytes(plain.convert("CMYK"), "JPEG"), "cmyk")
    assert decoded(cmyk).mode == "RGB"
    frames = [noise(seed=number).convert("P") for number in range(3)]
    gif = examine(as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:]), "gif")
    assert gif.notes == ("move, and are shown by their first frame",)
    assert np.array_equal(np.asarray(decoded(gif)), np.asarray(frames[0].convert("RGB")))
    for mode in ("L", "LA", "P", "1"):
        assert decoded(examine(as_bytes(plain.convert(mode)), mode)).mode == "RGB"


def test_what_stands_behind_a_pictures_end_is_no_part_of_it() -> None:
    """Telephones put a film behind a photograph, others a gain map or the other eye's picture."""
    behind = bytes(200_000) + b"\xff\xd8"
    for kind, mode in (("JPEG", "RGB"), ("PNG", "RGB"), ("GIF", "P"), ("WEBP", "RGB"), ("BMP", "RGB")):
        image = noise((200, 100)).convert(mode)
        found = examine(as_bytes(image, kind) + behind, kind)
        assert np.asarray(decoded(found)).shape == (100, 200, 3)
    for options in ({"progressive": True}, {"restart_marker_blocks": 4}, {"exif": b"Exif\0\0" + b"\xff\xd9" * 9}):
        whole = as_bytes(noise((200, 100)), "JPEG", **options)
        examine(whole + behind, "whole")
        with pytest.raises(DataError, match="cut off"):
            examine(whole[:-2], "cut")
    both = as_bytes(noise(), "MPO", save_all=True, append_images=[noise(seed=1)])
    assert Image.open(io.BytesIO(both)).format == "MPO"
    assert examine(both + behind, "both").notes == ("hold several pictures, and are shown by the first",)
    pages = as_bytes(noise(), "TIFF", save_all=True, append_images=[noise(seed=1)])
    assert examine(pages, "pages").notes == ("hold several pictures, and are shown by the first",)


def test_what_readers_pass_over_in_a_gif_is_no_end_of_it() -> None:
    """Some programs put zeros before a frame, which Pillow passes over."""
    data = as_bytes(noise().convert("P"), "GIF")
    frame = data.index(b"\x2c", 13 + 3 * 256)
    padded = data[:frame] + bytes(3) + data[frame:]
    assert (examine(padded, "it").width, decoded(examine(padded, "it")).size) == (40, (40, 24))
    with pytest.raises(BadPicture, match="cut off"):
        examine(padded[:-900], "it")


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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "MPO"])
def test_damaged_files_are_pictures_or_named(kind: str) -> None:
    """Nothing but our own error leaves, wherever bits are turned or parts are cut out."""
    draw, image = random.Random(kind), noise((60, 40)).convert("P" if kind == "GIF" else "RGB")
    more = {"save_all": True, "append_images": [noise((60, 40), seed=1)]} if kind == "MPO" else {}
    whole, named = as_bytes(image, kind, **more), 0
    for _ in range(60):
        try:
            found = decoded(examine(mutated_bytes(whole, draw), "it"), (32, 32))
            assert found.size == (32, 32)
        except BadPicture:
            named += 1
    assert named > 5


def test_the_thinnest_and_the_smallest_that_are_taken(tokenizer: Any, folder: Path) -> None:
    """One pixel is a picture; it is said that there is little to see."""
    for size, seed in (((1, 1), 0), ((1, 200), 1), ((200, 1), 2)):
        noise(size, seed=seed).save(folder / f"{seed}.png")
    rows = [{"messages": chat("<image>?"), "images": [f"{seed}.png"]} for seed in range(3)]
    found = read(tokenizer, folder, *rows[:1])
    assert any("1 picture has few pixels" in each or "have few pixels" in each for each in found.report.information)
    processor = processor_of(tokenizer)
    assert processor is not None
    for sample in found.train.samples:
        assert sample[0].media is not None
        assert processor.inputs(sample[0].media.items)["pixel_values"].numel()
    noise((201, 1)).save(folder / "2.png")
    with pytest.raises(DataError, match="too thin"):
        read(tokenizer, folder, rows[2])


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


def test_a_changed_or_missing_file_is_named_when_it_is_needed(folder: Path) -> None:
    path = folder / "pictures" / "0.png"
    picture = examine(path.read_bytes(), "0.png", str(path))
    noise(seed=5).save(path)
    with pytest.raises(DataError, match=r"a picture has changed: .*0\.png"):
        decoded(picture)
    path.unlink()
    with pytest.raises(DataError, match=r"a picture is missing: .*0\.png"):
        decoded(picture)


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


def test_preferences_show_the_prompts_pictures_to_both_answers(tokenizer: Any, folder: Path) -> None:
    row = {"prompt": "<image>What?", "chosen": "A cat.", "rejected": "A dog.", "images": ["pictures/0.png"]}
    (sample,) = read(tokenizer, folder, row, record=Preference).train.samples
    assert [segment.media and segment.media.spans for segment in sample] == [sample[0].media.spans] * 2  # type: ignore[union-attr]


def test_a_base_without_eyes_says_so(folder: Path, tmp_path: Path) -> None:
    from tests.checkpoint_folder import save_checkpoint_folder

    blind = load_tokenizer(ModelConfig(path=str(save_checkpoint_folder(tmp_path / "text"))))
    with pytest.raises(DataError, match="this base reads text only"):
        read(blind, folder, {"messages": chat("<image>?"), "images": ["pictures/0.png"]})


def test_a_template_that_loses_pictures_is_refused(tokenizer: Any, folder: Path) -> None:
    row = {"messages": chat("<image>What?"), "images": ["pictures/0.png"]}
    with pytest.raises(DataError, match=r"leaves out|shows 0 places of pictures|cannot render"):
        read(tokenizer, folder, row, chat_template="chatml")


def test_a_processor_that_cannot_be_made_is_an_error_of_the_model(folder: Path, tmp_path: Path) -> None:
    path = save_vision_folder(tmp_path / "m", "llava")
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (path / name).exists():
            (path / name).write_text('{"image_processor_type": "Nonesuch", "processor_class": "Nonesuch"}')
    tokenizer = load_tokenizer(ModelConfig(path=str(path)))
    with pytest.raises(ModelError, match="processor of pictures"):
        read(tokenizer, folder, {"messages": chat("<image>What?"), "images": ["pictures/0.png"]})


def test_tokenized_data_holds_no_pictures(tokenizer: Any, folder: Path) -> None:
    row = {"messages": chat("<image>What?"), "images": ["pictures/0.png"]}
    with pytest.raises(DataError, match="tokenized_path: rows with pictures"):
        read(tokenizer, folder, row, tokenized_path=str(folder / "kept"))
