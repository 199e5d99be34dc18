"""How much of pictures and videos a model's processor is given, with LLaMA-Factory's meaning and numbers: what is
larger is made smaller before it sees it, what is smaller larger; of videos, frames at even distances."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_PIXELS = 768 * 768
MIN_PIXELS = 32 * 32
VIDEO_MAX_PIXELS = 256 * 256
VIDEO_MIN_PIXELS = 16 * 16
VIDEO_FPS = 2.0
VIDEO_MAXLEN = 128
MAX_RATIO = 200
"""Of the longer side to the shorter: what Qwen's processors take. Others make the shorter side as long as their tower
wants it, and the picture larger by as much: of 6000 x 2 pixels one of 336 x 1,008,000, 3.8 GB."""


@dataclass(frozen=True)
class MediaLimits:
    """The settings of the same names (models/config.py)."""

    image_max_pixels: int = MAX_PIXELS
    image_min_pixels: int = MIN_PIXELS
    video_max_pixels: int = VIDEO_MAX_PIXELS
    video_min_pixels: int = VIDEO_MIN_PIXELS
    video_fps: float = VIDEO_FPS
    video_maxlen: int = VIDEO_MAXLEN

    def of_picture(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) within the limits of pixels."""
        return _within(width, height, self.image_max_pixels, self.image_min_pixels)

    def of_frame(self, width: int, height: int) -> tuple[int, int]:
        """The same of a frame of a video."""
        return _within(width, height, self.video_max_pixels, self.video_min_pixels)

    def frames(self, number: int, fps: float | None) -> tuple[int, ...]:
        """Which of a video's frames are shown: `video_fps` of a second, at even distances; all of one that data gives
        as pictures (`fps` None); never more than `video_maxlen`. Two at least, if need be the same one twice: towers
        take them in pairs."""
        wanted = number if fps is None else math.floor(number / fps * self.video_fps)
        wanted = max(2, min(number, self.video_maxlen, wanted))
        return tuple(int(place * (number - 1) / (wanted - 1)) for place in range(wanted))


def is_thin(width: int, height: int) -> bool:
    """Whether its sides are more than `MAX_RATIO` apart."""
    return max(width, height) > MAX_RATIO * min(width, height)


def _within(width: int, height: int, most: int, least: int) -> tuple[int, int]:
    for limit, beyond in ((most, width * height > most), (least, width * height < least)):
        if beyond:
            factor = math.sqrt(limit / (width * height))
            width, height = max(1, int(width * factor)), max(1, int(height * factor))
    return width, height
