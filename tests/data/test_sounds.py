"""Rows with sounds: read from every way people write them, brought to the model's rate, counted, refused by name."""

from __future__ import annotations

import base64
import importlib
import io
import json
import re
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.prepare import Prepared, prepare
from lowrank.errors import DataError
from lowrank.media.audio import decoded_audio, examine_audio, made_up_wav, resampled_length
from lowrank.media.processor import processor_of
from lowrank.models.config import ModelConfig
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.records import Conversation, Text
from tests.sound_rows import write_sound
from tests.tiny_audio_models import AUDIO_MODELS, RATE, save_audio_folder
from tests.tiny_composites import AUDIO


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_audio_folder(tmp_path_factory.mktemp("m") / "m", "qwen2_5_omni_thinker")
    return load_tokenizer(ModelConfig(path=str(folder)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        write_sound(tmp_path / "data" / "sounds" / f"{number}.wav", 0.3 + 0.2 * number, RATE, number)
    return tmp_path / "data"


def read(tokenizer: Any, folder: Path, *rows: dict[str, Any], record: type = Conversation, **settings: Any) -> Prepared:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = SourceConfig(path=str(path), media_dir=settings.pop("media_dir", None))
    config = DataConfig(train=(source,), shuffle=False, **settings)
    return prepare(config, tokenizer=tokenizer, record=record, seed=0)


def digests(prepared: Prepared) -> list[list[str]]:
    return [[each.digest for each in sample[0].media.items] for sample in prepared.train.samples if sample[0].media]


def of_files(folder: Path, *numbers: int) -> list[str]:
    return [examine_audio((folder / "sounds" / f"{number}.wav").read_bytes(), "").digest for number in numbers]


def chat(question: Any, answer: str = "A cat.") -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_every_way_to_write_them(tokenizer: Any, folder: Path) -> None:
    raw = base64.b64encode((folder / "sounds" / "0.wav").read_bytes()).decode()
    place, text = {"type": "audio"}, {"type": "text", "text": "What is it?"}
    turns = [{"from": "human", "value": "<audio>What?"}, {"from": "gpt", "value": "A cat."}]
    rows = [
        {"messages": chat("<audio>What is it?"), "audios": ["sounds/0.wav"]},
        {"instruction": "<audio>What is it?", "output": "A cat.", "audios": ["sounds/0.wav"]},
        {"conversations": turns, "audios": ["sounds/0.wav"]},
        {"conversations": turns, "audio": "sounds/0.wav"},
        {"messages": chat([place, text]), "audios": ["sounds/0.wav"]},
        {"messages": chat("What is it?"), "audios": ["sounds/0.wav"]},
        {"prompt": chat("What is it?")[:1], "completion": chat("")[1:], "audio": "sounds/0.wav"},
        {"messages": chat([{"type": "input_audio", "input_audio": {"data": raw, "format": "wav"}}, text])},
        {"messages": chat([{"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{raw}"}}, text])},
        {"messages": chat([{"type": "audio", "audio": "sounds/0.wav"}, text])},
        {"messages": chat([{"type": "audio", "path": "sounds/0.wav"}, text])},
        {"messages": chat([{"type": "audio", "base64": raw}, text])},
        {"messages": chat("<audio>What is it?"), "audio": {"bytes": raw, "path": None}},
        {"messages": chat("<audio>What is it?"), "audios": [raw]},
        {"messages": chat("<audio>"), "audios": ["sounds/0.wav"]},
    ]
    for row in rows:
        found = read(tokenizer, folder, row)
        assert digests(found) == [of_files(folder, 0)], row
        (segment,) = found.train.samples[0]
        ((first, end),) = segment.media.spans  # type: ignore[union-attr]
        assert (segment.token_L[first:end] == AUDIO).all()
        assert (segment.token_L == AUDIO).sum() == end - first > 3
        assert not segment.weight_L[first:end].any()
        assert segment.weight_L.sum() == len("A cat.") + 1


def test_many_sounds_keep_their_order_and_places(tokenizer: Any, folder: Path) -> None:
    turns = [*chat("<audio>a<audio>b", "x"), *chat("c<audio>", "y")]
    found = read(tokenizer, folder, {"messages": turns, "audios": [f"sounds/{n}.wav" for n in (2, 0, 1)]})
    assert digests(found) == [of_files(folder, 2, 0, 1)]
    shown = "".join(text for text, _ in found.report.shown[0])
    shown = re.sub(r"<\|audio_bos\|>\[sound of ([\d.]+) s: \d+ tokens\]<\|audio_eos\|>", r"[\1]", shown)
    assert "user\n[0.7]a[0.3]b<|im_end|>" in shown
    assert "user\nc[0.5]<|im_end|>" in shown
    (dataset,) = found.report.datasets
    assert (dataset.sounds, dataset.media_kinds) == (3, ("audio",))
    assert "3 sounds in 1 rows, 3 of them different; " in dataset.notes[0]
    assert "2 seconds in all, the longest has 0.7" in dataset.notes[0]


def test_html_is_text(tokenizer: Any, folder: Path) -> None:
    found = read(tokenizer, folder, {"messages": chat("Write <audio>a.mp3</audio>.")})
    assert digests(found) == []


def in_format(kind: str, samples: np.ndarray, rate: int = RATE, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, RATE).astype(np.float32)
FORMATS = [("FLAC", None), ("OGG", "VORBIS"), ("MP3", None), ("WAV", "FLOAT"), ("WAV", "PCM_24"), ("AIFF", None)]


@pytest.mark.parametrize(("kind", "subtype"), FORMATS)
def test_formats(kind: str, subtype: str | None) -> None:
    audio = examine_audio(in_format(kind, NOISE, subtype=subtype), "x")
    assert (audio.frames, audio.rate) == (RATE, RATE)
    assert len(decoded_audio(audio, RATE)) == RATE
    if kind not in ("OGG", "MP3"):
        assert np.abs(decoded_audio(audio, RATE) - NOISE).max() < 1e-4


def test_channels_and_rates() -> None:
    """A tone in two channels at 44.1 kHz: their mean, at 16 kHz the same tone."""
    place = np.arange(44_100) / 44_100
    tone = np.sin(2 * np.pi * 440 * place) * 0.4
    data = in_format("WAV", np.stack([tone, tone * 0.5], axis=1), 44_100, "FLOAT")
    audio = examine_audio(data, "x")
    assert audio.notes == ("have several channels, and are heard as their mean",)
    found = decoded_audio(audio, 16_000)
    assert found.dtype == np.float32
    assert len(found) == resampled_length(audio, 16_000) == 16_000
    wanted = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000) * 0.3
    assert np.abs(found - wanted)[200:-200].max() < 1e-4
    odd = examine_audio(in_format("WAV", NOISE[:777], 11_025), "x")
    assert len(decoded_audio(odd, 16_000)) == resampled_length(odd, 16_000)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_python_alone_reads_wav(width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    subtype = {1: "PCM_U8", 2: "PCM_16", 3: "PCM_24", 4: "PCM_32"}[width]
    both = np.stack([NOISE, -NOISE * 0.5], axis=1)
    wav, flac = in_format("WAV", both, subtype=subtype), in_format("FLAC", NOISE)
    slow = examine_audio(in_format("WAV", NOISE, 8000), "slow.wav")
    theirs = decoded_audio(examine_audio(wav, "x"), RATE)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(ImportError):
        importlib.import_module("soundfile")
    with wave.open(io.BytesIO(wav)) as reader:
        assert reader.getsampwidth() == width
    audio = examine_audio(wav, "x", decode=True)
    np.testing.assert_allclose(decoded_audio(audio, RATE), theirs, rtol=0, atol=1e-6)
    with pytest.raises(DataError, match=r"x.flac is no WAV that Python reads by itself.*lowrank-llm\[audio\]"):
        examine_audio(flac, "x.flac")
    with pytest.raises(DataError, match=r"slow.wav|8,000 samples a second, and the model takes 16,000.*\[audio\]"):
        decoded_audio(slow, RATE)


def test_other_rates_want_soxr(tokenizer: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is trained."""
    write_sound(folder / "slow.wav", 0.5, 8000)
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(DataError, match=r"8,000 samples a second, and the model takes 16,000: .*\[audio\]"):
        read(tokenizer, folder, {"messages": chat("<audio>?"), "audios": ["slow.wav"]})


def promising(seconds: int) -> bytes:
    """A FLAC whose header promises so many seconds."""
    data = bytearray(in_format("FLAC", NOISE))
    samples = seconds * RATE
    bits = int.from_bytes(data[18:26], "big")
    data[18:26] = ((bits >> 36 << 36) | samples).to_bytes(8, "big")
    return bytes(data)


BAD: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, r"a sound is missing: there is no file .*bad\.wav"),
    "text": (b"hello, I am no sound at all", r"not a sound: .*bad\.wav cannot be read \(it begins with b'hello"),
    "empty": (b"", r"not a sound: .*bad\.wav is empty"),
    "no samples": (made_up_wav(NOISE[:0], RATE), r"an empty sound: .*bad\.wav has no samples"),
    "header alone": (made_up_wav(NOISE, RATE)[:30], r"a broken sound: .*bad\.wav is cut off"),
    "cut wav": (made_up_wav(NOISE, RATE)[:-900], r"a broken sound: .*bad\.wav is cut off: 32,044 bytes promised"),
    "cut aiff": (in_format("AIFF", NOISE)[:-900], r"a broken sound: .*bad\.wav is cut off"),
    "cut flac": (in_format("FLAC", NOISE)[:-9000], r"a broken sound: .*bad\.wav cannot be decoded"),
    "cut ogg": (in_format("OGG", NOISE)[:3000], r"not a sound: .*bad\.wav cannot be read \(it begins with b'OggS"),
    "cut mp3": (in_format("MP3", np.tile(NOISE, 3))[:-8000], r"a broken sound: .*is cut off: .*samples promised"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(40), r"not a sound: "),
    "long": (promising(4000), r"a sound too long: .*bad\.wav has 4,000 seconds, 1,800 at most; cut it in pieces"),
    "nan": (in_format("WAV", np.full(900, np.nan, np.float32), subtype="FLOAT"), "samples that are not numbers"),
    "short": (made_up_wav(NOISE[:1], RATE), "the model's processor refuses its sounds: .*too short"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_their_row(name: str, tokenizer: Any, folder: Path) -> None:
    data, problem = BAD[name]
    if data is not None:
        (folder / "bad.wav").write_bytes(data)
    good = {"messages": chat("<audio>What?"), "audios": ["sounds/0.wav"]}
    bad = {"messages": chat("<audio>?"), "audios": ["bad.wav"]}
    found = read(tokenizer, folder, good, bad, check_pictures="decode" if name == "nan" else "header")
    (loss,) = found.report.losses
    assert "1 row (row 2) of 2 left out" in loss
    assert re.search(problem, loss), loss


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"messages": chat("<audio><audio>?"), "audios": ["sounds/0.wav"]}, "2 .* for 1 in column 'audios'"),
    ({"messages": chat("<audio>?"), "audios": ["sounds/0.wav"] * 2}, "1 .* for 2 in column 'audios'"),
    ({"messages": chat("<audio>?")}, "1 .* for 0 in no column of audios"),
    ({"messages": chat("?", "<audio>"), "audios": ["sounds/0.wav"]}, "a sound in an answer"),
    ({"messages": chat("<audio>?"), "audios": ["http://a.b/c.wav"]}, "a sound behind a URL.*nothing is fetched"),
    ({"messages": chat("<audio>?"), "audios": ["../secret.wav"]}, "outside of the data's folder.*media_dir.*sounds"),
    ({"messages": chat("<audio>?"), "audios": ["/etc/passwd"]}, "outside of the data's folder"),
    ({"messages": chat("<audio>?"), "audios": ["a\0b"]}, "zero byte"),
    ({"messages": chat("<audio>?"), "audios": [7]}, "wrong type for audios"),
    ({"messages": chat("<audio>?"), "audio": {"array": [0.0], "sampling_rate": 8}}, "keep the file instead"),
    ({"messages": chat("<audio>?"), "audios": ["data:audio/wav;base64,%%%"]}, "a broken sound: its base64"),
    ({"messages": chat("<audio>?"), "audios": ["data:text/html;base64,AAAA"]}, "is no data:audio"),
    ({"messages": chat("<audio>? <|AUDIO|>"), "audios": ["sounds/0.wav"]}, r"write <audio> there.*`audios`"),
    ({"text": "Hear.", "audios": ["sounds/0.wav"]}, "plain text has no turn"),
]


@pytest.mark.parametrize(("row", "problem"), BAD_ROWS, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_bad_rows_are_named(row: dict[str, Any], problem: str, tokenizer: Any, folder: Path) -> None:
    with pytest.raises(DataError, match=problem):
        read(tokenizer, folder, row, record=Text if "text" in row else Conversation)


def test_media_dir_is_another_root(tokenizer: Any, folder: Path, tmp_path: Path) -> None:
    write_sound(tmp_path / "elsewhere" / "9.wav", 0.4, RATE)
    row = {"messages": chat("<audio>?"), "audios": ["9.wav"]}
    assert digests(read(tokenizer, folder, row, media_dir=str(tmp_path / "elsewhere")))


def test_sounds_that_are_not_heard_to_their_end_are_counted(tokenizer: Any, folder: Path) -> None:
    write_sound(folder / "long.wav", 9.0, RATE)
    rows = [
        {"messages": chat("<audio>?"), "audios": ["long.wav"]},
        {"messages": chat("<audio>?"), "audios": ["sounds/2.wav"]},
    ]
    notes = read(tokenizer, folder, *rows).report.datasets[0].notes
    assert "1 sounds are longer than the model's processor takes, which leaves their end out (row 1)" in notes


@pytest.mark.parametrize("family", AUDIO_MODELS)
def test_counts_without_decoding_are_those_of_the_processor(family: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=str(save_audio_folder(tmp_path, family))))
    processor = processor_of(tokenizer)
    assert processor is not None
    for lengths in ([5000], [16_000, 3333], [31_999, 401, 16_000]):
        sounds = [examine_audio(made_up_wav(np.resize(NOISE, length), RATE), "") for length in lengths]
        own = processor.own(
            audio=[decoded_audio(each, RATE) for each in sounds],
            text=["".join([processor.placeholder("audio")] * len(sounds))],
            audio_kwargs={"sampling_rate": RATE},
        )
        written = tokenizer("".join(processor.placeholders(sounds)), add_special_tokens=False)["input_ids"]
        assert written == list(own["input_ids"][0])
