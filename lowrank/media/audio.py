"""Sounds out of files: how long they are, and their samples as a model's feature extractor wants them, one channel at
its rate.

WAV of whole numbers is read by Python itself; every other format by soundfile, and other rates by soxr, both of
the extra `audio`. What WAV files promise is compared with what they hold; of other formats only decoding tells, so
they are decoded when the data is read.
"""

from __future__ import annotations

import io
import re
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.media.medium_files import BadMedium, beginning_of, bytes_of, check_size, digest_of, read_medium
from lowrank.records import Audio

MOST_SECONDS = 1800
"""Half an hour: 115 MB of samples at 16 kHz."""
MOST_BYTES = 512 * 2**20
_EXTRA = "pip install 'lowrank-llm[audio]'"


class BadAudio(BadMedium):
    """A file that is no sound to learn from."""

    one = "a sound"


def read_audio_file(path: Path, name: str) -> bytes:
    """The bytes of a sound's file. BadAudio for what is none."""
    return read_medium(path, name, MOST_BYTES, BadAudio)


def examine_audio(data: bytes, name: str, path: str | None = None, *, decode: bool = False) -> Audio:
    """The sound in these bytes. BadAudio for what is none, is cut off, empty or longer than MOST_SECONDS. `path`: of
    the file they are from, which is read again when it is needed; None: they are kept. `decode`: also WAV."""
    check_size(data, name, MOST_BYTES, BadAudio)
    if not data:
        raise BadAudio("not a sound", f"{name} is empty")
    _check_whole(data, name)
    frames, rate, channels = _header(data, name)
    if frames > MOST_SECONDS * rate:
        raise BadAudio(
            "a sound too long", f"{name} has {frames / rate:,.0f} seconds, {MOST_SECONDS:,} at most; cut it in pieces"
        )
    if decode or not _is_wav(data):
        frames = len(_samples(data, name)[0])
    if not frames:
        raise BadAudio("an empty sound", f"{name} has no samples")
    notes = ("have several channels, and are heard as their mean",) if channels > 1 else ()
    return Audio(digest_of(data), frames, rate, notes, path=path, data=None if path else data)


def decoded_audio(audio: Audio, rate: int) -> np.ndarray:
    """The samples of a sound, float32, one channel, `rate` of them in a second. BadAudio where its file has gone,
    changed, or cannot be decoded."""
    found_N, own_rate = _samples(bytes_of(audio, MOST_BYTES, BadAudio), audio.name)
    if own_rate == rate:
        return found_N
    wanted = resampled_length(audio, rate)
    resampled_N = _soxr(audio.name, own_rate, rate).resample(found_N, own_rate, rate)
    return np.pad(resampled_N, (0, max(0, wanted - len(resampled_N))))[:wanted].astype(np.float32)


def resampled_length(audio: Audio, rate: int) -> int:
    """Samples that `decoded_audio` gives."""
    return audio.frames if audio.rate == rate else max(1, round(audio.frames * rate / audio.rate))


def check_rate(audio: Audio, rate: int) -> None:
    """BadAudio where a sound cannot be brought to this rate here."""
    if audio.rate != rate:
        _soxr(audio.name, audio.rate, rate)


def made_up_wav(samples_N: np.ndarray, rate: int) -> bytes:
    """A WAV file of samples between -1 and 1."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, rate, 0, "NONE", ""))
        writer.writeframes((samples_N * 32767).astype("<i2").tobytes())
    return file.getvalue()


def _is_wav(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WAVE"


def _check_whole(data: bytes, name: str) -> None:
    """BadAudio for a WAV or AIFF file that promises more than there is; recorders that could not go back leave 0 or the
    largest number in its place."""
    if data[:4] == b"FORM" and struct.unpack(">I", data[4:8].ljust(4, b"\0"))[0] + 8 > len(data) + 1:
        raise BadAudio("a broken sound", f"{name} is cut off: it promises more than its {len(data):,} bytes")
    if not _is_wav(data):
        return
    at, size = 12, 0
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], struct.unpack("<I", data[at + 4 : at + 8])[0]
        if kind == b"data":
            if size not in (0, 0xFFFFFFFF) and at + 8 + size > len(data):
                raise BadAudio(
                    "a broken sound", f"{name} is cut off: {at + 8 + size:,} bytes promised, {len(data):,} there"
                )
            return
        at += 8 + size + size % 2
    raise BadAudio("a broken sound", f"{name} is cut off: it has no samples; get it again")


def _header(data: bytes, name: str) -> tuple[int, int, int]:
    """(frames, rate, channels)."""
    soundfile = _soundfile()
    if soundfile is None:
        with _wave(data, name) as reader:
            return reader.getnframes(), reader.getframerate(), reader.getnchannels()
    try:
        found = soundfile.info(io.BytesIO(data))
    except Exception as error:
        raise BadAudio("not a sound", f"{name} cannot be read ({beginning_of(data)}): {_text(error)}") from error
    if found.samplerate <= 0 or found.channels <= 0:
        raise BadAudio("a broken sound", f"{name}: {found.channels} channels of {found.samplerate} samples a second")
    return found.frames, found.samplerate, found.channels


def _samples(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """(float32 samples, the mean of the channels; their rate)."""
    soundfile = _soundfile()
    if soundfile is None:
        with _wave(data, name) as reader:
            rate, width, channels = reader.getframerate(), reader.getsampwidth(), reader.getnchannels()
            raw = reader.readframes(reader.getnframes())
        return _of_whole_numbers(raw, width).reshape(-1, channels).mean(axis=1), rate
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate: int = file.samplerate
            found_NC = file.read(frames=(MOST_SECONDS + 1) * rate, dtype="float32", always_2d=True)
            promised = min(file.frames, (MOST_SECONDS + 1) * rate)
    except Exception as error:
        raise BadAudio("a broken sound", f"{name} cannot be decoded: {_text(error)}") from error
    if len(found_NC) > MOST_SECONDS * rate:
        raise BadAudio("a sound too long", f"{name} has more than {MOST_SECONDS:,} seconds; cut it in pieces")
    if len(found_NC) < promised:
        raise BadAudio("a broken sound", f"{name} is cut off: {promised:,} samples promised, {len(found_NC):,} there")
    if not np.isfinite(found_NC).all():
        raise BadAudio("a broken sound", f"{name} has samples that are not numbers")
    return found_NC.mean(axis=1, dtype=np.float32), rate


def _of_whole_numbers(raw: bytes, width: int) -> np.ndarray:
    if width == 1:
        return (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    if width == 3:
        bytes_N3 = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        wide_N4 = np.concatenate([np.zeros((len(bytes_N3), 1), np.uint8), bytes_N3], axis=1)
        return wide_N4.copy().view("<i4")[:, 0].astype(np.float32) / 2**31
    return np.frombuffer(raw, f"<i{width}").astype(np.float32) / 2 ** (8 * width - 1)


def _wave(data: bytes, name: str) -> wave.Wave_read:
    """By Python alone."""
    try:
        return wave.open(io.BytesIO(data), "rb")
    except (wave.Error, EOFError) as error:
        kind = "a kind of WAV" if _is_wav(data) else "no WAV"
        raise BadAudio(
            "a sound cannot be read here", f"{name} is {kind} that Python reads by itself ({_text(error)}): {_EXTRA}"
        ) from error


def _soundfile() -> Any:
    """The package; None where it is not installed, or not its library."""
    try:
        import soundfile
    except (ImportError, OSError):
        return None
    return soundfile


def _soxr(name: str, own_rate: int, rate: int) -> Any:
    try:
        import soxr
    except ImportError as error:
        raise BadAudio(
            "a sound cannot be read here",
            f"{name} has {own_rate:,} samples a second, and the model takes {rate:,}: {_EXTRA}, or convert it",
        ) from error
    return soxr


def _text(error: Exception) -> str:
    message = " ".join(str(error).split()).removeprefix("Error opening ")
    return re.sub(r"<_io\.BytesIO[^>]*>: ", "", message)[:200] or type(error).__name__
