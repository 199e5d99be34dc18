"""Records: rows of data in the form that objectives take, before tokenization.

row of a file -> Record -> Segment -> Batch -> Scores      (segments.py, batches.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal, Union

Role = Literal["system", "user", "assistant", "tool"]


THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Fields of a turn that hold the reasoning before the answer, in transformers' order of precedence."""


@dataclass(frozen=True)
class Picture:
    """A picture as its file has it. Two are equal if their `digest` is, which is so for equal files.

    digest          of the file's bytes
    width, height   in pixels, after the rotation that its file says
    path, data      where the bytes are: a file, or here
    """

    kind: ClassVar[str] = "image"
    digest: str
    width: int
    height: int
    notes: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """Notices about what is not used as it is stored."""
    path: str | None = field(default=None, repr=False, compare=False)
    data: bytes | None = field(default=None, repr=False, compare=False)
    row: str = field(default="", repr=False, compare=False)
    """A description of the row that names it."""

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.path or f"the picture {self.digest[:8]}"

    @property
    def shown(self) -> str:
        """Its description in messages."""
        return f"picture {self.width} x {self.height}"


@dataclass(frozen=True)
class Audio:
    """A sound as its file has it. Two are equal if their `digest` is.

    digest       of the file's bytes
    frames       number of samples of one channel
    rate         samples per second
    path, data   where the bytes are: a file, or here
    """

    kind: ClassVar[str] = "audio"
    digest: str
    frames: int
    rate: int
    notes: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """Notices about what is not used as it is stored."""
    path: str | None = field(default=None, repr=False, compare=False)
    data: bytes | None = field(default=None, repr=False, compare=False)
    row: str = field(default="", repr=False, compare=False)
    """A description of the row that names it."""

    @property
    def seconds(self) -> float:
        """Its length in seconds."""
        return self.frames / self.rate

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.path or f"the sound {self.digest[:8]}"

    @property
    def shown(self) -> str:
        """Its description in messages."""
        return f"sound of {self.seconds:.1f} s"


@dataclass(frozen=True)
class Video:
    """A video as its file has it, or as pictures. Two are equal if their `digest` is.

    digest            of the file's bytes, or of its pictures
    width, height     in pixels, after the rotation that its file says
    frames            number of frames
    fps               frames per second; None where the data names single frames
    path, data        where the bytes are: a file, or here
    pictures          or its frames
    """

    kind: ClassVar[str] = "video"
    digest: str
    width: int
    height: int
    frames: int
    fps: float | None = None
    notes: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """Notices about what is not used as it is stored."""
    path: str | None = field(default=None, repr=False, compare=False)
    data: bytes | None = field(default=None, repr=False, compare=False)
    row: str = field(default="", repr=False, compare=False)
    """A description of the row that names it."""
    pictures: tuple[Picture, ...] = field(default=(), repr=False, compare=False)

    @property
    def name(self) -> str:
        """Its name in messages."""
        of_pictures = f"the video from {self.pictures[0].name}" if self.pictures else None
        return self.path or of_pictures or f"the video {self.digest[:8]}"

    @property
    def shown(self) -> str:
        """Its description in messages."""
        return f"video of {self.frames} frames, {self.width} x {self.height}"


Medium = Union[Picture, Video, Audio]  # noqa: UP007 (also read at run time, on Python 3.10)
"""A picture, video or sound of a text. `kind`: its name in chat templates."""
KIND_NAMES = {"image": "pictures", "video": "videos", "audio": "sounds"}
"""Names of the kinds in messages."""
COLUMN_NAMES = {"image": "images", "video": "videos", "audio": "audios"}
"""Names of the columns of data that hold them."""


@dataclass(frozen=True)
class Message:
    """One turn. `tool_calls` is OpenAI's: `({"id", "type": "function", "function": {"name", "arguments": dict}},)`;
    other fields of a call are kept."""

    role: Role
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    trained: bool = True
    """False keeps an assistant turn as context only (OpenAI's `weight: 0`)."""
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Other fields of the turn, passed to the chat template unchanged: `tool_call_id` and `name` of a tool's result,
    `reasoning_content`, and any other that the template reads."""
    media: tuple[tuple[int, Medium], ...] = ()
    """Pictures, videos and sounds in `content`, in order: `(index into content, medium)`."""

    @property
    def texts(self) -> list[str]:
        """`content` split at its media, one part more than there are media."""
        cuts = [0, *(place for place, _ in self.media), len(self.content)]
        return [self.content[first:end] for first, end in pairwise(cuts)]

    @property
    def thinks(self) -> bool:
        """Whether it has reasoning, in a field or in its content."""
        return bool(self.thought) or self.content.lstrip().startswith("<think>")

    @property
    def thought(self) -> str:
        """The reasoning before the answer; empty if there is none."""
        return next((text for name in THOUGHTS if isinstance(text := self.fields.get(name), str) and text), "")


@dataclass(frozen=True)
class Conversation:
    """A chat, in which the assistant's turns are trained on. `tools`: OpenAI function schemas."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Text:
    """Plain text, all of whose tokens are trained on."""

    text: str


@dataclass(frozen=True)
class Preference:
    """A conversation that ends in a question, and two answers to it."""

    prompt: Conversation
    chosen: Message
    rejected: Message


@dataclass(frozen=True)
class Rated:
    """A conversation that ends in an answer which was rated desirable or undesirable (TRL: unpaired preference)."""

    conversation: Conversation
    desirable: bool


@dataclass(frozen=True)
class Prompted:
    """A conversation without the last answer, which the model in training generates (TRL: prompt-only). `columns`: the
    row of data, for reward functions; `label`: the answer in the data, if there is one."""

    prompt: Conversation
    columns: Mapping[str, Any]
    label: str | None = None


Record = Union[Conversation, Text, Preference, Rated, Prompted]  # noqa: UP007 (also read at run time, on Python 3.10)
