"""Records: what a row of data says, in the form objectives understand. Of tokens and tensors nothing is known here.

row of a file -> Record -> Segment -> Batch -> Scores      (segments.py, batches.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal, Union

Role = Literal["system", "user", "assistant", "tool"]


THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Fields of a turn that hold what was thought before the answer, in transformers' order of precedence."""


@dataclass(frozen=True)
class Picture:
    """A picture as its file has it; what it shows is told by `digest` alone, which is equal for equal files.

    digest          of the file's bytes
    width, height   in pixels, as it is looked at (turned as its file says)
    path, data      where the bytes are: a file, or here
    """

    kind: ClassVar[str] = "image"
    digest: str
    width: int
    height: int
    notes: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """What of it is not shown as it is stored, in words."""
    path: str | None = field(default=None, repr=False, compare=False)
    data: bytes | None = field(default=None, repr=False, compare=False)
    row: str = field(default="", repr=False, compare=False)
    """The row of data that names it, in words."""

    @property
    def name(self) -> str:
        """For people."""
        return self.path or f"the picture {self.digest[:8]}"

    @property
    def shown(self) -> str:
        """What it is, for people."""
        return f"picture {self.width} x {self.height}"


@dataclass(frozen=True)
class Audio:
    """A sound as its file has it; what is heard is decided by `digest` alone.

    digest       of the file's bytes
    frames       samples of one channel
    rate         of them in a second
    path, data   where the bytes are: a file, or here
    """

    kind: ClassVar[str] = "audio"
    digest: str
    frames: int
    rate: int
    notes: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """What of it is not heard as it is stored, in words."""
    path: str | None = field(default=None, repr=False, compare=False)
    data: bytes | None = field(default=None, repr=False, compare=False)
    row: str = field(default="", repr=False, compare=False)
    """The row of data that names it, in words."""

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.frames / self.rate

    @property
    def name(self) -> str:
        """For people."""
        return self.path or f"the sound {self.digest[:8]}"

    @property
    def shown(self) -> str:
        """What it is, for people."""
        return f"sound of {self.seconds:.1f} s"


@dataclass(frozen=True)
class Video:
    """A video as its file has it, or as pictures; what it shows is decided by `digest` alone.

    digest            of the file's bytes, or of its pictures
    width, height     in pixels, as it is looked at
    frames            how many there are
    fps               of them in a second; None where data gives them one by one
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
    """What of it is not shown as it is stored, in words."""
    path: str | None = field(default=None, repr=False, compare=False)
    data: bytes | None = field(default=None, repr=False, compare=False)
    row: str = field(default="", repr=False, compare=False)
    """The row of data that names it, in words."""
    pictures: tuple[Picture, ...] = field(default=(), repr=False, compare=False)

    @property
    def name(self) -> str:
        """For people."""
        of_pictures = f"the video from {self.pictures[0].name}" if self.pictures else None
        return self.path or of_pictures or f"the video {self.digest[:8]}"

    @property
    def shown(self) -> str:
        """What it is, for people."""
        return f"video of {self.frames} frames, {self.width} x {self.height}"


Medium = Union[Picture, Video, Audio]  # noqa: UP007 (also read at run time, on Python 3.10)
"""What is shown or played with a text. `kind`: what chat templates call it."""
KIND_NAMES = {"image": "pictures", "video": "videos", "audio": "sounds"}
"""What people call them."""
COLUMN_NAMES = {"image": "images", "video": "videos", "audio": "audios"}
"""What columns of rows that hold them are called."""


@dataclass(frozen=True)
class Message:
    """One turn. `tool_calls` is OpenAI's: `({"id", "type": "function", "function": {"name", "arguments": dict}},)`;
    what else a call holds stays in it."""

    role: Role
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    trained: bool = True
    """False keeps an assistant turn as context only (OpenAI's `weight: 0`)."""
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What else the turn holds, handed to the chat template as it is: `tool_call_id` and `name` of a tool's result,
    `reasoning_content`, whatever the template reads."""
    media: tuple[tuple[int, Medium], ...] = ()
    """Pictures, videos and sounds at places in `content`, in order: (characters of `content` before it, what it is)."""

    @property
    def texts(self) -> list[str]:
        """`content` in the pieces that its media leave, one more than there are of them."""
        cuts = [0, *(place for place, _ in self.media), len(self.content)]
        return [self.content[first:end] for first, end in pairwise(cuts)]

    @property
    def thinks(self) -> bool:
        """It has a thought, in a field or in its content."""
        return bool(self.thought) or self.content.lstrip().startswith("<think>")

    @property
    def thought(self) -> str:
        """What was thought before the answer; empty if nothing was."""
        return next((text for name in THOUGHTS if isinstance(text := self.fields.get(name), str) and text), "")


@dataclass(frozen=True)
class Conversation:
    """A chat; the assistant's turns are what is learned. `tools` are OpenAI function schemas."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Text:
    """Plain text; every token is learned."""

    text: str


@dataclass(frozen=True)
class Preference:
    """A conversation that ends in a question, and two answers to it."""

    prompt: Conversation
    chosen: Message
    rejected: Message


@dataclass(frozen=True)
class Rated:
    """A conversation that ends in an answer somebody found desirable or not."""

    conversation: Conversation
    desirable: bool


@dataclass(frozen=True)
class Prompted:
    """A conversation that waits for an answer, which the model in training gives itself. `columns` is the row it came
    from: what a reward function may want to know. `label` is the answer in the data, where there is one."""

    prompt: Conversation
    columns: Mapping[str, Any]
    label: str | None = None


Record = Union[Conversation, Text, Preference, Rated, Prompted]  # noqa: UP007 (also read at run time, on Python 3.10)
