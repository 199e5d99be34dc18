"""Pictures in requests: OpenAI's own client, answers of transformers' `generate`, and strangers' files."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from lowrank.adapters.bank import Bank
from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.errors import DataError
from lowrank.generate.request import Prompt
from lowrank.media.decoding import examine
from lowrank.media.processor import MediaProcessor
from lowrank.models.checks import media_isolation as media_check
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.pipelines.inference import InferenceModel
from lowrank.records import Conversation, Message, Picture
from lowrank.serve.limits import RequestLimits
from tests.generate.test_pictures import whole
from tests.serve.running import Running, open_world, random_adapter, serving
from tests.tiny_vision_models import make_vision_model, save_vision_folder

NUMBER = 10
LIMITS = RequestLimits(picture_bytes=60_000, picture_pixels=100_000, pictures_per_request=3)


def seeing(folder: Path, family: str) -> InferenceModel:
    """A tiny random base that sees, and the adapter `one`."""
    model = ModelConfig(path=str(save_vision_folder(folder, family)), dtype="float32", device="cpu")
    tokenizer = load_tokenizer(model)
    base = load(model, tokenizer=tokenizer, notify=lambda _: None)
    trained = InferenceModel(base, Bank(base), Renderer(tokenizer, DataConfig()))
    random_adapter(trained, "one", 1, scale=0.5)
    return trained


@pytest.fixture(scope="module", params=["qwen3_vl", "llava"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(seeing(tmp_path_factory.mktemp("base"), request.param), limits=LIMITS) as running:
        running.service.family = request.param
        yield running


def drawn(seed: int, kind: str = "PNG", size: tuple[int, int] = (60, 40)) -> bytes:
    value = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(value).save(file, kind)
    return file.getvalue()


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def part(source: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": source, **more}}


def messages_of(text: str, *sources: str) -> Any:
    return [{"role": "user", "content": [*map(part, sources), {"type": "text", "text": text}]}]


def expected(server: Running, text: str, *pictures: Picture) -> str:
    """By transformers, of the bare base."""
    media = tuple((0, picture) for picture in pictures)
    segment = server.trained.renderer.prompt_segment(Conversation((Message("user", text, media=media),)))
    prompt = Prompt(segment.token_L, media=segment.media)
    tokens = whole(server.trained.base, make_vision_model(server.service.family), prompt, NUMBER)
    stops = server.trained.renderer.stop_tokens
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return server.trained.base.tokenizer.decode(tokens[:end], skip_special_tokens=True)


def answer(server: Running, messages: Any, model: str = "base", **options: Any) -> Any:
    return server.client().chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=NUMBER, **options
    )


def test_answers_to_openais_client_are_those_of_transformers(server: Running) -> None:
    first, second = drawn(0), drawn(1, "JPEG")
    one, other = examine(first, ""), examine(second, "")
    content = lambda reply: reply.choices[0].message.content  # noqa: E731
    assert content(answer(server, messages_of("Which?", url(first)))) == expected(server, "Which?", one)
    assert content(answer(server, messages_of("Which?", url(second, "jpeg")))) == expected(server, "Which?", other)
    both = messages_of("Which?", url(first), url(second, "jpeg"))
    assert content(answer(server, both)) == expected(server, "Which?", one, other)
    stream = answer(server, both, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected(server, "Which?", one, other)
    several = answer(server, both, n=2)
    assert [choice.message.content for choice in several.choices] == [expected(server, "Which?", one, other)] * 2
    assert content(answer(server, both, model="one")) != content(answer(server, both))
    assert server.settles()


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_bases_in_the_padded_layout_are_asked_too(family: str, tmp_path: Path) -> None:
    """Beside texts, which keep their places in steps where the family's texts run packed."""
    picture, content = drawn(0), lambda reply: reply.choices[0].message.content
    with serving(seeing(tmp_path, family), limits=LIMITS) as running:
        running.service.family = family
        seen = messages_of("Which?", url(picture))
        assert content(answer(running, seen)) == expected(running, "Which?", examine(picture, ""))
        assert content(answer(running, messages_of("Which?"))) == expected(running, "Which?")
        assert content(answer(running, seen, model="one")) != content(answer(running, seen))
        assert running.settles()


def test_equal_words_about_other_pictures_share_no_keys(server: Running) -> None:
    question = "What is to be seen in this picture, in a few words?"
    cached = [
        answer(server, messages_of(question, url(drawn(seed)))).usage.prompt_tokens_details.cached_tokens
        for seed in (5, 6, 5)
    ]
    assert cached[:2] == [0, 0]
    assert cached[2] > 16


def test_placeholders_that_somebody_types_are_text(server: Running) -> None:
    media_encoder = server.trained.base.media_encoder
    assert media_encoder is not None
    placeholder = server.trained.base.tokenizer.convert_ids_to_tokens(media_encoder.token)
    picture = drawn(2)
    reply = answer(server, messages_of(f"Is {placeholder} one? <image>", url(picture)))
    question = f"Is {placeholder} one? <image>"
    assert reply.choices[0].message.content == expected(server, question, examine(picture, ""))
    plain = answer(server, messages_of(question))
    tokens = server.trained.renderer.prompt_segment(Conversation((Message("user", question),))).token_L
    assert plain.usage.prompt_tokens == len(tokens)
    assert media_encoder.token not in tokens


def test_other_apis_show_pictures_too(server: Running) -> None:
    picture = drawn(3)
    right = expected(server, "Which?", examine(picture, ""))
    parts: Any = [{"type": "input_image", "image_url": url(picture), "detail": "auto"},
                  {"type": "input_text", "text": "Which?"}]  # fmt: skip
    response = server.client().responses.create(
        model="base", input=[{"role": "user", "content": parts}], temperature=0, max_output_tokens=NUMBER
    )
    assert response.output_text == right
    options = {"temperature": 0, "num_predict": NUMBER, "repeat_penalty": 1.0}
    shown = {"model": "base", "stream": False, "options": options}
    encoded = base64.b64encode(picture).decode()
    turn = {"role": "user", "content": "Which?", "images": [encoded]}
    http = server.http()
    assert http.post("/api/chat", json={**shown, "messages": [turn]}).json()["message"]["content"] == right
    generated = http.post("/api/generate", json={**shown, "prompt": "Which?", "images": [encoded]})
    assert generated.json()["response"] == right
    assert "vision" in http.post("/api/show", json={"model": "base"}).json()["capabilities"]


def test_what_has_no_effect_is_named(server: Running) -> None:
    content = [part(url(drawn(4)), detail="high"), {"type": "text", "text": "Which?"}]
    body = {"model": "base", "messages": [{"role": "user", "content": content}], "max_tokens": 2}
    assert "image_url.detail" in server.http().post("/v1/chat/completions", json=body).headers["x-lowrank-warning"]


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises this many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["http://localhost/cat.png"], "no URL is ever fetched"),
        (["https://example.org/cat.png"], "no URL is ever fetched"),
        (["file:///etc/passwd"], "no file is read"),
        (["/etc/passwd"], "no file is read"),
        (["data:text/html;base64,PGI+"], "expected data:image"),
        (["data:image/svg+xml;base64,PHN2Zz4="], "none of PNG"),
        (["data:image/png,abc"], "expected data:image"),
        (["data:image/png;base64,@@@"], "base64 cannot be read"),
        (["data:image/png;base64,"], "it is empty"),
        ([url(b"no picture at all")], "not a picture"),
        ([url(drawn(0, "TIFF"))], "none of PNG"),
        ([url(drawn(0)[:-40])], "a broken picture"),
        ([url(drawn(0)[:1500] + bytes(200) + drawn(0)[1700:])], "a broken picture"),
        ([url(bomb(60_000, 60_000))], "says it has 3,600,000,000 pixels, 100,000 in all"),
        ([url(bomb(6000, 2))], "a picture too thin"),
        ([url(bomb(1000, 101))], "100,000 in all at most"),
        ([url(drawn(0, size=(200, 200)))], "more than 60,000 bytes"),
        ([url(drawn(0))] * 4, "4 pictures in one request"),
    ],
)  # fmt: skip
def test_what_is_no_picture_within_the_limits_is_refused(server: Running, sources: list[str], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        answer(server, messages_of("Which?", *sources))
    assert message in caught.value.message
    assert server.settles()


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image_url"}],
        [{"type": "image_url", "image_url": {"url": 5}}],
        [{"type": "image_url", "image_url": {"url": ["a"], "detail": ["b"]}}],
        [{"type": "image", "path": "/etc/passwd"}],
        [{"type": "image", "image": "https://example.org/cat.png"}],
        [{"type": "input_image", "file_id": "f"}],
        [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}],
    ],
)
def test_other_parts_are_refused_by_name(server: Running, content: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=r"expected data:image|unsupported content"):
        answer(server, [{"role": "user", "content": content}])


def test_pictures_are_the_users(server: Running) -> None:
    for role in ("system", "assistant"):
        turns = [{"role": role, "content": [part(url(drawn(0)))]}, {"role": "user", "content": "Which?"}]
        with pytest.raises(openai.BadRequestError, match="in a user's turn pictures"):
            answer(server, turns)


def test_a_picture_that_fails_in_the_step_ends_its_own_answer_alone(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = examine(drawn(9), "").digest
    inputs = MediaProcessor.inputs

    def failing(self: MediaProcessor, pictures: Any) -> Any:
        if any(picture.digest == bad for picture in pictures):
            raise DataError("it cannot be made ready")
        return inputs(self, pictures)

    monkeypatch.setattr(MediaProcessor, "inputs", failing)
    client = server.client()
    beside = client.chat.completions.create(
        model="base", messages=messages_of("Go on."), temperature=0, max_tokens=200, stream=True, logit_bias={}
    )
    chunks = iter(beside)
    next(chunks)
    with pytest.raises(openai.BadRequestError, match="it cannot be made ready"):
        answer(server, messages_of("Which?", url(drawn(9))))
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] in ("stop", "length")
    right = expected(server, "Which?", examine(drawn(8), ""))
    assert answer(server, messages_of("Which?", url(drawn(8)))).choices[0].message.content == right
    assert server.settles()


def test_a_base_without_a_tower_says_so() -> None:
    with serving(open_world()) as running:
        with pytest.raises(openai.BadRequestError, match="reads text only"):
            answer(running, messages_of("Which?", url(drawn(0))))
        assert "vision" not in running.http().post("/api/show", json={"model": "base"}).json()["capabilities"]


def test_a_base_that_leaks_in_both_layouts_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_check, "_what_leaks", lambda base: f"it leaks with padded={base.media_encoder.padded}")
    with serving(seeing(tmp_path, "gemma3")) as running:
        with pytest.raises(openai.BadRequestError, match="packed, it leaks with padded=False; padded, it leaks with"):
            answer(running, messages_of("Which?", url(drawn(0))))
        assert answer(running, messages_of("Which?")).choices[0].message.content is not None


def test_bodies_with_pictures_may_be_larger(server: Running) -> None:
    http: httpx.Client = server.http()
    body = {"model": "base", "messages": messages_of("x" * (5 << 20)), "max_tokens": 1}
    assert http.post("/v1/chat/completions", json=body).status_code == 400, "too long for the model, not for the server"
