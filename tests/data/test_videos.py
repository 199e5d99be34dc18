"""Rows with videos: read from every way people write them, frames chosen as LLaMA-Factory does, refused by name."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.formats.media_files import Folders, medium_of
from lowrank.data.prepare import Prepared, prepare
from lowrank.errors import DataError, ModelError
from lowrank.media.decoding import examine
from lowrank.media.limits import MediaLimits
from lowrank.media.processor import processor_of
from lowrank.media.torchvision import torchvision_problem
from lowrank.media.video import decoded_video, examine_video
from lowrank.models.config import ModelConfig
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.records import Conversation, Video
from tests.tiny_composites import VIDEO
from tests.tiny_video_models import save_watching_folder
from tests.video_rows import noise_frames, write_frames, write_gif

resized = pytest.mark.skipif(torchvision_problem() is not None, reason=str(torchvision_problem()))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_watching_folder(tmp_path_factory.mktemp("m") / "m", "qwen3_vl")
    return load_tokenizer(ModelConfig(path=str(folder)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_gif(tmp_path / "data" / "a.gif", 6, (40, 24))
    write_frames(tmp_path / "data" / "frames", 3, (36, 28))
    return tmp_path / "data"


def read(tokenizer: Any, folder: Path, *rows: dict[str, Any], **settings: Any) -> Prepared:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(train=(SourceConfig(path=str(path)),), shuffle=False, **settings)
    return prepare(config, tokenizer=tokenizer, record=Conversation, seed=0)


def chat(question: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "A cat."}]


@resized
def test_every_way_to_write_them(tokenizer: Any, folder: Path) -> None:
    raw = base64.b64encode((folder / "a.gif").read_bytes()).decode()
    digest = examine_video((folder / "a.gif").read_bytes(), "").digest
    place, text = {"type": "video"}, {"type": "text", "text": "What is it?"}
    rows = [
        {"messages": chat("<video>What is it?"), "videos": ["a.gif"]},
        {"instruction": "<video>What is it?", "output": "A cat.", "videos": ["a.gif"]},
        {"messages": chat("<video>What is it?"), "video": "a.gif"},
        {"messages": chat([place, text]), "videos": ["a.gif"]},
        {"messages": chat("What is it?"), "videos": ["a.gif"]},
        {"messages": chat([{"type": "video", "video": "a.gif"}, text])},
        {"messages": chat([{"type": "video_url", "video_url": {"url": f"data:video/gif;base64,{raw}"}}, text])},
        {"messages": chat("<video>What is it?"), "video": {"bytes": raw, "path": None}},
    ]
    for row in rows:
        found = read(tokenizer, folder, row)
        (segment,) = found.train.samples[0]
        assert [each.digest for each in segment.media.items] == [digest], row  # type: ignore[union-attr]
        ((first, end),) = segment.media.spans  # type: ignore[union-attr]
        assert (segment.token_L[first:end] == VIDEO).sum() > 3
        assert (segment.token_L == VIDEO).sum() == (segment.token_L[first:end] == VIDEO).sum()
        assert not segment.weight_L[first:end].any()
    (dataset,) = found.report.datasets
    assert (dataset.videos, dataset.media_kinds) == (1, ("video",))
    assert "1 videos in 1 rows, 1 of them different; " in dataset.notes[0]


@resized
def test_frames_as_a_list(tokenizer: Any, folder: Path) -> None:
    frames = [f"frames/{place}.png" for place in range(3)]
    rows = [
        {"messages": chat("<video>?"), "videos": [frames]},
        {"messages": chat([{"type": "video", "video": frames}, {"type": "text", "text": "?"}])},
    ]
    for row in rows:
        ((segment,),) = read(tokenizer, folder, row).train.samples
        (video,) = segment.media.items  # type: ignore[union-attr]
        assert isinstance(video, Video)
        assert (video.frames, video.fps, video.width) == (3, None, 36)
    shown = decoded_video(video, (0, 2), (36, 28))
    assert np.array_equal(shown[1], np.asarray(Image.open(folder / "frames" / "2.png")))


@pytest.mark.skipif(torchvision_problem() is None, reason="torchvision is here")
def test_without_torchvision_it_is_said_before_the_model_loads(tokenizer: Any, folder: Path) -> None:
    row = {"messages": chat("<video>?"), "videos": ["a.gif"]}
    with pytest.raises(ModelError, match=r"by torchvision, and .*pip install 'lowrank-llm\[video\]'"):
        read(tokenizer, folder, row)
    picture = {"messages": chat("<image>?"), "images": ["frames/0.png"]}
    assert read(tokenizer, folder, picture).media_kinds == ("image",)


def test_frames_are_chosen_as_llama_factory_does() -> None:
    """`np.linspace(0, total - 1, min(total, maxlen, floor(seconds * fps)))`, as in its `_get_video_sample_indices`."""
    for total, fps in ((300, 30.0), (50, 25.0), (9, 3.3), (3, 30.0), (4000, 24.0)):
        wanted = min(total, 128, max(2, int(total / fps * 2.0)))  # they repeat the last frame of an odd number
        theirs = np.linspace(0, total - 1, wanted).astype(np.int32)
        assert np.abs(np.array(MediaLimits().frames(total, fps)) - theirs).max() <= 1
        assert len(MediaLimits().frames(total, fps)) == wanted
    assert MediaLimits(video_maxlen=4).frames(10, None) == (0, 3, 6, 9)
    assert MediaLimits().frames(5, None) == (0, 1, 2, 3, 4)
    assert MediaLimits().frames(1, 10.0) == (0, 0)


def test_a_gif_has_the_frames_of_its_file(tmp_path: Path) -> None:
    data = write_gif(tmp_path / "a.gif", 5, (16, 8), 200).read_bytes()
    video = examine_video(data, "a.gif")
    assert (video.frames, video.width, video.height) == (5, 16, 8)
    assert video.fps == pytest.approx(5.0)
    shown = decoded_video(video, (1, 4), (16, 8))
    with Image.open(io.BytesIO(data)) as image:
        for place, frame in zip((1, 4), shown):
            image.seek(place)
            assert np.array_equal(frame, np.asarray(image.convert("RGB")))
    assert decoded_video(video, (0,), (8, 4)).shape == (1, 4, 8, 3)


def mp4(frames: int, size: tuple[int, int] = (32, 16), kind: str = "mp4") -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream("mpeg4" if kind != "matroska" else "ffv1", rate=Fraction(10))
        stream.width, stream.height = size
        for image in noise_frames(frames, size):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("kind", ["mp4", "matroska", "avi"])
def test_files_of_cameras(kind: str) -> None:
    data = mp4(12, kind=kind)
    video = examine_video(data, "a.mp4", decode=True)
    assert (video.frames, video.width, video.height) == (12, 32, 16)
    assert video.fps == pytest.approx(10.0)
    shown = decoded_video(video, (0, 11), (32, 16))
    wanted = [np.asarray(image, np.float64) for image in noise_frames(12, (32, 16))]
    apart = [np.abs(shown[1] - each).mean() for each in wanted]
    assert int(np.argmin(apart)) == 11
    if kind != "matroska":  # which does not say how many frames there are
        with pytest.raises(DataError, match=r"a broken video: a.mp4"):
            examine_video(data[: len(data) * 2 // 3], "a.mp4", decode=True)


def test_playlists_are_no_videos(tmp_path: Path) -> None:
    """What ffmpeg would take for a list of further files and addresses."""
    for text in (b"#EXTM3U\n#EXTINF:1,\nhttp://a.b/c.ts\n", b"ffconcat version 1.0\nfile '/etc/passwd'\n"):
        with pytest.raises(DataError, match="not a video: x is none of MP4"):
            examine_video(text, "x")


def test_without_pyav_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"a video cannot be read here: a.mp4 wants PyAV: pip install.*\[video\]"):
        examine_video(b"\0\0\0\x18ftypmp42" + bytes(40), "a.mp4")


def still() -> bytes:
    file = io.BytesIO()
    noise_frames(1, (8, 8))[0].save(file, "PNG")
    return file.getvalue()


BAD: list[tuple[Any, str]] = [
    ("none.gif", r"a video is missing: there is no file .*none\.gif"),
    (b"hello", "not a video: .* is none of MP4, .*it begins with b'hello'"),
    (b"\0", "not a video"),
    (still(), "is a picture; a video of pictures is a list of their names"),
    ([], "an empty video: its list has no frames"),
    (["frames/0.png", "none.png"], "a picture is missing"),
    (["frames/0.png", "../x.png"], "a picture outside of the data's folder"),
    ("../x.gif", "a video outside of the data's folder.*videos"),
    ("http://a.b/c.mp4", "a video behind a URL"),
    (7, "wrong type for videos"),
    ({"path": None}, "a video is missing: there is nothing"),
]


@pytest.mark.parametrize(("value", "problem"), BAD, ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_bad_videos_are_named(value: Any, problem: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        medium_of(value, "video", Folders(folder))


def test_a_thin_video_is_named(tmp_path: Path) -> None:
    write_gif(tmp_path / "thin.gif", 2, (402, 2))
    with pytest.raises(DataError, match=r"a video too thin: it has frames of 402 x 2 pixels; .*200 times"):
        examine_video((tmp_path / "thin.gif").read_bytes(), "it")


def test_a_cut_gif_is_named(folder: Path) -> None:
    data = (folder / "a.gif").read_bytes()[:-2000]
    with pytest.raises(DataError, match="a broken video"):
        examine_video(data, "a.gif", decode=True)


def test_html_and_places(tokenizer: Any, folder: Path) -> None:
    found = read(tokenizer, folder, {"messages": chat("Write <video>a.mp4</video>.")})
    assert found.media_kinds == ()
    with pytest.raises(DataError, match="not as many places as videos: 1"):
        read(tokenizer, folder, {"messages": chat("<video>?")})


def test_a_changed_picture_of_a_video_is_another_video(folder: Path) -> None:
    frames = [f"frames/{place}.png" for place in range(3)]
    one = medium_of(frames, "video", Folders(folder))
    noise_frames(1, (36, 28), 9)[0].save(folder / "frames" / "1.png")
    other = medium_of(frames, "video", Folders(folder))
    assert one.digest != other.digest
    assert examine((folder / "frames" / "1.png").read_bytes(), "").digest == other.pictures[1].digest  # type: ignore[union-attr]


@resized
def test_limits_of_frames(tmp_path: Path, folder: Path) -> None:
    """Fewer pixels, fewer frames: fewer tokens."""
    model = save_watching_folder(tmp_path / "m", "qwen2_5_vl")
    video = examine_video(write_gif(tmp_path / "b.gif", 16, (64, 48), 250).read_bytes(), "b.gif")
    counts = []
    for settings in ({}, {"video_max_pixels": 16 * 16}, {"video_maxlen": 2}, {"video_fps": 4.0}):
        processor = processor_of(load_tokenizer(ModelConfig(path=str(model), **settings)))
        assert processor is not None
        (text,) = processor.placeholders([video])
        counts.append(len(re.findall(r"<\|video_pad\|>", text)))
        assert processor.inputs([video])["video_grid_thw"].prod().item() // 4 == counts[-1]
    assert counts[1] < counts[0]
    assert counts[2] * 4 == counts[0]
    assert counts[3] == counts[0] * 2


@pytest.mark.parametrize("sound", [False, True])
def test_a_sound_of_its_own_is_said_not_to_be_heard(sound: bool) -> None:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        track = container.add_stream("aac", rate=16_000) if sound else None
        for number in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), number * 40, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if track is not None:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
            samples.sample_rate = 16_000
            container.mux(track.encode(samples))
            container.mux(track.encode())
    notes = examine_video(file.getvalue(), "it").notes
    assert notes == (("have a sound of their own, which is not heard",) if sound else ())
