"""Conversations about sounds, as LLaMA-Factory's `mllm_audio_demo.json` writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lowrank.media.audio import made_up_wav
from tests.media_rows import write_conversations

_SECONDS = (0.6, 1.1, 0.35)
_TURNS = (
    ((0,), (("<audio>What's that sound?", "It is the sound of glass shattering."),)),
    ((1, 2), (("<audio>What can you hear?", "A woman is coughing."), ("And now?<audio>", "A clock."))),
    ((2,), (("Who speaks?<audio>", "A man."), ("What does he say?", "He counts to three."))),
    ((0, 0), (("<audio>这是什么声音？", "玻璃碎了。"), ("再听一遍<audio>", "一样。"))),
)


def write_sound(path: Path, seconds: float, rate: int, seed: int = 0) -> Path:
    """A WAV file of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples_N = np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * rate))
    path.write_bytes(made_up_wav(samples_N, rate))
    return path


def write_sound_rows(folder: Path, rate: int) -> Path:
    """The file of four conversations in `folder`, with three sounds beside it."""
    for number, seconds in enumerate(_SECONDS):
        write_sound(folder / "sounds" / f"{number}.wav", seconds, rate, number)
    talks = [([f"sounds/{number}.wav" for number in numbers], turns) for numbers, turns in _TURNS]
    return write_conversations(folder / "audio.json", "audios", talks)
