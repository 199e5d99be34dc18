"""Pictures out of files, by Pillow: what a file holds by its header, and its pixels as they are to be looked at.

    upright       turned as the camera says (EXIF), which transformers does for paths alone
    RGB           transparent parts on white; CMYK, grey and palettes converted; 16 bits scaled down (Pillow's own
                  conversion makes them all white)
    first frame   of what moves

Files are strangers: only these formats' readers are used (others of Pillow's start programs), and a header that
promises more than `MOST_PIXELS` is refused before anything is decoded.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank.media.endings import is_cut_off
from lowrank.media.limits import MAX_RATIO, is_thin
from lowrank.media.medium_files import BadMedium, beginning_of, bytes_of, check_size, digest_of, read_medium, text_of
from lowrank.records import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MOST_PIXELS = 89_478_485
"""Pillow's own limit of what it takes without a warning: 256 MB decoded."""
MOST_BYTES = 64 * 2**20
_FEW_PIXELS = 64
_MOVING = ("GIF", "WEBP", "PNG")


class BadImage(BadMedium):
    """A file that is no picture to learn from."""

    one = "a picture"


def examine(
    data: bytes,
    name: str,
    path: str | None = None,
    *,
    formats: Sequence[str] = FORMATS,
    most_pixels: int = MOST_PIXELS,
) -> Picture:
    """The picture in these bytes, from its header alone. BadImage for what is none of `formats`, is cut off, promises
    more than `most_pixels`, or is thinner than any processor takes. `path`: of the file they are from, which is read
    again when it is needed; None: they are kept."""
    check_size(data, name, MOST_BYTES, BadImage)
    with _opened(data, name, formats, most_pixels) as image:
        width, height = _upright_size(image)
        if width * height > most_pixels:
            raise BadImage(
                "a picture too large",
                f"{name} says it has {width:,} x {height:,} pixels, {most_pixels:,} in all at most; make it smaller",
            )
        if min(width, height) < 1 or is_thin(width, height):
            raise BadImage(
                "a picture too thin",
                f"{name} has {width:,} x {height:,} pixels; one side may be {MAX_RATIO} times the other at most; cut "
                "it in pieces, or leave it out",
            )
        if is_cut_off(data, image):
            raise BadImage(
                "a broken picture", f"{name} is cut off: the end of its {image.format} is missing; get it again"
            )
        notes = _peculiarities(image)
    return Picture(digest_of(data), width, height, notes, path=path, data=None if path else data)


def read_file(path: Path, name: str) -> bytes:
    """The bytes of a picture's file. BadImage for what is none."""
    return read_medium(path, name, MOST_BYTES, BadImage)


def decoded(picture: Picture, size: tuple[int, int] | None = None) -> Image:
    """The picture as it is looked at, RGB, made larger or smaller to `size` (width, height). BadImage where its file
    has gone, changed, or cannot be decoded."""
    with _opened(bytes_of(picture, MOST_BYTES, BadImage), picture.name) as image:
        image = _as_rgb(_decoded(image, picture.name))
    if size is not None and image.size != size:
        image = image.resize(size)
    return image


def _peculiarities(image: Image) -> tuple[str, ...]:
    """What of a file is not shown as it is stored, as what is said of pictures in the plural."""
    several = _has_several(image)
    found = {
        "are turned as their EXIF says": _turned(image),
        "move, and are shown by their first frame": several and image.format in _MOVING,
        "hold several pictures, and are shown by the first": several and image.format not in _MOVING,
        "have few pixels (a placeholder?), and are made larger": image.width * image.height < _FEW_PIXELS,
        "have 16 bits or more, and are shown in 8": image.mode.startswith(("I", "F")),
        "have transparent parts, which are shown white": image.mode in ("LA", "PA", "RGBA")
        or "transparency" in image.info,
    }
    return tuple(what for what, is_so in found.items() if is_so)


def _has_several(image: Image) -> bool:
    """Frames or pages; not how many: a file of some megabytes may have a million."""
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # frames behind the first that cannot be read are not shown either
        return False


def from_pillow(image: Image) -> bytes:
    """The bytes of a PNG of an image in memory, upright."""
    from PIL import ImageOps

    upright: Any = ImageOps.exif_transpose(image)
    if upright.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
        upright = upright.convert("RGB")
    file = io.BytesIO()
    upright.save(file, "PNG")
    return file.getvalue()


def blank(size: tuple[int, int]) -> Image:
    """A black picture of a size."""
    from PIL import Image

    return Image.new("RGB", size)


@contextlib.contextmanager
def _opened(
    data: bytes, name: str, formats: Sequence[str] = FORMATS, most_pixels: int = MOST_PIXELS
) -> Generator[Image]:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large ones, which are told by their size; of strange EXIF
            image = Image.open(io.BytesIO(data), formats=tuple(formats))
    except Image.DecompressionBombError as error:
        counted = re.search(r"\d+", str(error))  # how many, by Pillow
        many = f"{int(counted[0]):,}" if counted else "far more"
        raise BadImage(
            "a picture too large", f"{name} says it has {many} pixels, {most_pixels:,} in all at most; make it smaller"
        ) from error
    except UnidentifiedImageError as error:
        known = ", ".join(formats)
        raise BadImage("not a picture", f"{name} is none of {known} ({beginning_of(data)})") from error
    except Exception as error:  # Pillow's readers raise what they like at what they were not made for
        raise BadImage("a broken picture", f"{name}: {text_of(error)}") from error
    with image:
        yield image


def _decoded(image: Image, name: str) -> Image:
    from PIL import ImageOps

    try:
        image.load()
        upright: Any = ImageOps.exif_transpose(image) if _turned(image) else image
        return upright
    except Exception as error:
        raise BadImage("a broken picture", f"{name} cannot be decoded: {text_of(error)}") from error


def _as_rgb(image: Image) -> Image:
    from PIL import Image as images

    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I;16") or image.mode == "I":
        value = np.asarray(image).astype(np.int64)
        most = 65535 if value.max(initial=0) > 255 else 255
        return images.fromarray((value.clip(0, most) * 255 // most).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        value = np.nan_to_num(np.asarray(image, np.float64))
        most = max(1.0, float(value.max(initial=0.0)))
        return images.fromarray((value.clip(0, most) * (255 / most)).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        shown = image.convert("RGBA")
        return images.alpha_composite(images.new("RGBA", shown.size, "white"), shown).convert("RGB")
    return image.convert("RGB")


def _turned(image: Image) -> bool:
    try:
        return image.getexif().get(0x0112, 1) in range(2, 9)
    except Exception:  # EXIF that cannot be read says nothing
        return False


def _upright_size(image: Image) -> tuple[int, int]:
    width, height = image.size
    with contextlib.suppress(Exception):
        if image.getexif().get(0x0112, 1) in (5, 6, 7, 8):
            return height, width
    return width, height
