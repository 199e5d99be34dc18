"""Videos out of files: how many frames of what size, and those of them that a model is shown.

GIF, WebP and APNG are read by Pillow; MP4, MOV, WebM, Matroska and AVI by PyAV (the extra `video`); data may also
name the frames one by one, as pictures. Files are strangers: the container is told by its first bytes, never
by ffmpeg's guesses, of which some open further files and addresses.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.media.decoding import MOST_PIXELS, decoded
from lowrank.media.limits import MAX_RATIO, is_thin
from lowrank.media.medium_files import BadMedium, beginning_of, bytes_of, check_size, digest_of, read_medium, text_of
from lowrank.records import Picture, Video

MOST_BYTES = 512 * 2**20
MOST_FRAMES = 108_000
"""An hour at 30 frames a second."""
_EXTRA = "pip install 'lowrank-llm[video]'"
_MOVING = ("GIF", "WEBP", "PNG")


class BadVideo(BadMedium):
    """A file that is no video to learn from."""

    one = "a video"


def read_video_file(path: Path, name: str) -> bytes:
    """The bytes of a video's file. BadVideo for what is none."""
    return read_medium(path, name, MOST_BYTES, BadVideo)


def examine_video(data: bytes, name: str, path: str | None = None, *, decode: bool = False) -> Video:
    """The video in these bytes, by its headers and the sizes of its frames. BadVideo for what is none, is cut off, or
    too large. `path`: of the file they are from, which is read again when it is needed; None: they are kept. `decode`:
    also all frames."""
    check_size(data, name, MOST_BYTES, BadVideo)
    width, height, frames, fps, sounds = _header(data, name)
    if width * height > MOST_PIXELS or frames > MOST_FRAMES:
        raise BadVideo(
            "a video too large",
            f"{name} says it has {frames:,} frames of {width:,} x {height:,} pixels; {MOST_FRAMES:,} frames of "
            f"{MOST_PIXELS:,} pixels are the most; cut it in pieces",
        )
    if not frames:
        raise BadVideo("an empty video", f"{name} has no frames")
    if min(width, height) < 1 or is_thin(width, height):
        raise BadVideo(
            "a video too thin",
            f"{name} has frames of {width:,} x {height:,} pixels; one side may be {MAX_RATIO} times the other at most",
        )
    notes = ("have a sound of their own, which is not heard",) if sounds else ()
    video = Video(digest_of(data), width, height, frames, fps, notes, path=path, data=None if path else data)
    if decode:
        decoded_video(video, range(frames), (8, 8))
    return video


def video_of(pictures: Sequence[Picture]) -> Video:
    """The video whose frames data gives one by one. BadVideo where there are none."""
    if not pictures:
        raise BadVideo("an empty video", "its list has no frames")
    digest = digest_of(" ".join(each.digest for each in pictures).encode())
    first = pictures[0]
    sizes = {(each.width, each.height) for each in pictures}
    notes = ("have frames of different sizes, which are brought to the first's",) if len(sizes) > 1 else ()
    return Video(digest, first.width, first.height, len(pictures), None, notes, pictures=tuple(pictures))


def decoded_video(video: Video, places: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """The frames at `places`, ascending, as (frames, height, width, 3) bytes, each made larger or smaller to `size`
    (width, height). BadVideo where its file has gone, changed, or cannot be decoded."""
    if video.pictures:
        frames = [np.asarray(decoded(video.pictures[place], size)) for place in places]
        return np.stack(frames)
    data = bytes_of(video, MOST_BYTES, BadVideo)
    wanted = set(places)
    found = {
        place: np.asarray(image.resize(size) if image.size != size else image)
        for place, image in enumerate(_frames(data, video.name, max(places) + 1))
        if place in wanted
    }
    if len(found) < len(wanted):
        raise BadVideo("a broken video", f"{video.name} has {len(found)} of the {len(wanted)} frames that are shown")
    return np.stack([found[place] for place in places])


def _header(data: bytes, name: str) -> tuple[int, int, int, float, bool]:
    """(width, height, frames, frames in a second, whether it has a sound of its own)."""
    if _container(data) is None:
        return *_moving_header(data, name), False
    with _opened(data, name) as (container, stream):
        try:
            frames = sum(bool(packet.size) for packet in container.demux(stream) if packet.pts is not None)
        except Exception as error:
            raise BadVideo("a broken video", f"{name} is cut off: {text_of(error)}") from error
        if frames < stream.frames:
            raise BadVideo("a broken video", f"{name} is cut off: {stream.frames:,} frames promised, {frames:,} there")
        fps = float(stream.average_rate or 0) or frames / max(1e-3, _seconds(container, stream))
        width, height, sounds = stream.width, stream.height, bool(container.streams.audio)
    if frames and _turns(data, name):
        width, height = height, width
    return width, height, frames, fps, sounds


def _seconds(container: Any, stream: Any) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * Fraction(stream.time_base))
    return (container.duration or 0) / 1_000_000


def _turns(data: bytes, name: str) -> bool:
    """Whether its first frame is looked at lying on its side, as telephones store what was filmed upright."""
    with _opened(data, name) as (container, stream):
        try:
            return next(int(frame.rotation) % 180 == 90 for frame in container.decode(stream))
        except StopIteration:
            return False
        except Exception as error:
            raise BadVideo("a broken video", f"{name} cannot be decoded: {text_of(error)}") from error


def _frames(data: bytes, name: str, most: int) -> Iterator[Any]:
    """The first `most` frames, upright, as pictures of Pillow's in RGB."""
    if _container(data) is None:
        yield from _moving_frames(data, name, most)
        return
    with _opened(data, name) as (container, stream):
        try:
            for place, frame in enumerate(container.decode(stream)):
                if place == most:
                    return
                image = frame.to_image()
                yield image.rotate(frame.rotation, expand=True) if frame.rotation else image
        except Exception as error:
            raise BadVideo("a broken video", f"{name} cannot be decoded: {text_of(error)}") from error


class _opened:
    """The container and its video stream, by PyAV."""

    def __init__(self, data: bytes, name: str) -> None:
        try:
            import av  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise BadVideo("a video cannot be read here", f"{name} wants PyAV: {_EXTRA}, or name its frames") from error
        options = {"protocol_whitelist": "file"}
        try:
            self._container: Any = av.open(io.BytesIO(data), format=_container(data), options=options)
        except Exception as error:
            raise BadVideo("a broken video", f"{name} cannot be opened: {text_of(error)}") from error
        self._name = name

    def __enter__(self) -> tuple[Any, Any]:
        if not self._container.streams.video:
            self._container.close()
            raise BadVideo("not a video", f"{self._name} has no pictures in it")
        stream = self._container.streams.video[0]
        stream.thread_type = "AUTO"
        return self._container, stream

    def __exit__(self, *error: object) -> None:
        self._container.close()


def _container(data: bytes) -> str | None:
    """ffmpeg's name of the container, by the first bytes; None: it is for Pillow."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
        return "mp4"
    if data[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    return "avi" if data[:4] == b"RIFF" and data[8:12] == b"AVI " else None


def _moving_header(data: bytes, name: str) -> tuple[int, int, int, float]:
    with _moving(data, name) as image:
        frames = int(getattr(image, "n_frames", 1))
        if frames == 1 and image.format != "GIF":
            raise BadVideo("not a video", f"{name} is a picture; a video of pictures is a list of their names")
        try:
            seconds = 0.0
            for place in range(frames):
                image.seek(place)
                seconds += float(image.info.get("duration") or 100) / 1000
        except Exception as error:
            raise BadVideo("a broken video", f"{name} cannot be decoded: {text_of(error)}") from error
        return image.width, image.height, frames, frames / max(seconds, 1e-3)


def _moving_frames(data: bytes, name: str, most: int) -> Iterator[Any]:
    with _moving(data, name) as image:
        try:
            for place in range(min(most, int(getattr(image, "n_frames", 1)))):
                image.seek(place)
                yield image.convert("RGB")
        except Exception as error:
            raise BadVideo("a broken video", f"{name} cannot be decoded: {text_of(error)}") from error


def _moving(data: bytes, name: str) -> Any:
    from PIL import Image

    try:
        return Image.open(io.BytesIO(data), formats=_MOVING)
    except Exception as error:
        known = "MP4, MOV, WebM, Matroska, AVI, GIF, WebP, APNG"
        raise BadVideo("not a video", f"{name} is none of {known} ({beginning_of(data)})") from error
