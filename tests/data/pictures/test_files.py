"""Files of pictures: turned, of several frames, strange or damaged; examined, decoded, and refused by name."""

from __future__ import annotations

import io
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

from lowrank.errors import DataError
from lowrank.media.decoding import BadImage, decoded, examine
from lowrank.media.processor import processor_of
from tests.data.pictures.rows import as_bytes, chat, noise, read
from tests.fuzzing import mutated_bytes


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


def test_a_million_frames_are_not_counted() -> None:
    whole = as_bytes(noise((1, 1)).convert("P"), "GIF")
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x01\0\0"
    began = time.process_time()
    found = examine(whole[:-1] + frame * 1_000_000 + b";", "it")
    assert time.process_time() - began < 1
    assert "move, and are shown by their first frame" in found.notes


def test_what_readers_pass_over_in_a_gif_is_no_end_of_it() -> None:
    """Some programs put zeros before a frame, which Pillow passes over."""
    data = as_bytes(noise().convert("P"), "GIF")
    frame = data.index(b"\x2c", 13 + 3 * 256)
    padded = data[:frame] + bytes(3) + data[frame:]
    assert (examine(padded, "it").width, decoded(examine(padded, "it")).size) == (40, (40, 24))
    with pytest.raises(BadImage, match="cut off"):
        examine(padded[:-900], "it")


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
        except BadImage:
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


def test_a_changed_or_missing_file_is_named_when_it_is_needed(folder: Path) -> None:
    path = folder / "pictures" / "0.png"
    picture = examine(path.read_bytes(), "0.png", str(path))
    noise(seed=5).save(path)
    with pytest.raises(DataError, match=r"a picture has changed: .*0\.png"):
        decoded(picture)
    path.unlink()
    with pytest.raises(DataError, match=r"a picture is missing: .*0\.png"):
        decoded(picture)
