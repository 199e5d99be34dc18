"""Conversations about videos, as LLaMA-Factory's `mllm_video_demo.json` writes them; one of them as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tests.media_rows import write_conversations


def write_gif(path: Path, frames: int, size: tuple[int, int], milliseconds: int = 100, seed: int = 0) -> Path:
    """A GIF of noise."""
    images = noise_frames(frames, size, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=milliseconds, loop=0)
    return path


def noise_frames(number: int, size: tuple[int, int], seed: int = 0) -> list[Image.Image]:
    """Pictures of noise."""
    width, height = size
    draws = np.random.default_rng(seed)
    return [
        Image.fromarray(draws.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert("RGB")
        for _ in range(number)
    ]


def write_frames(folder: Path, number: int, size: tuple[int, int], seed: int = 0) -> Sequence[str]:
    """Pictures in `folder`; their names from the folder above it."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, image in enumerate(noise_frames(number, size, seed)):
        image.save(folder / f"{place}.png")
    return [f"{folder.name}/{place}.png" for place in range(number)]


def write_video_rows(folder: Path) -> Path:
    """The file of four conversations in `folder`, with videos beside it."""
    write_gif(folder / "videos" / "0.gif", 20, (40, 24), seed=0)
    write_gif(folder / "videos" / "1.gif", 9, (24, 32), 300, seed=1)
    frames = write_frames(folder / "frames", 3, (36, 28), 2)
    talks = (
        (["videos/0.gif"], (("<video>What happens?", "A man walks."),)),
        (["videos/1.gif", "videos/0.gif"], (("<video>Who is it?", "A dog."), ("And here?<video>", "A cat."))),
        ([frames], (("Describe <video> it.", "It is red."), ("Why?", "It rains."))),
        (["videos/1.gif"], (("<video>视频里有什么？", "一只狗。"),)),
    )
    return write_conversations(folder / "video.json", "videos", talks)
