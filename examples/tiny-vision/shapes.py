"""Pictures of a few coloured shapes, what is to be seen on them, and questions about them in English and Chinese.

    python examples/tiny-vision/shapes.py OUT_FOLDER [--train 4000] [--heldout 200] [--seed 0]

writes `train.jsonl`, `heldout.jsonl` and their pictures: the skill that `shapes.yaml` teaches. `pretrain.py` draws the
pictures that the base learns to see from; it hears them described in words and is never asked in the skill's form.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 60
"""Width and height of a picture, in pixels."""
COLORS = (
    ("red", "红色", (214, 40, 40)),
    ("green", "绿色", (46, 160, 67)),
    ("blue", "蓝色", (38, 84, 214)),
    ("yellow", "黄色", (240, 200, 30)),
    ("purple", "紫色", (140, 60, 190)),
    ("black", "黑色", (20, 20, 20)),
)
SHAPES = (("circle", "circles", "圆形"), ("square", "squares", "正方形"), ("triangle", "triangles", "三角形"))
NUMBERS = (("one", "一"), ("two", "两"), ("three", "三"), ("four", "四"))
MOST = len(NUMBERS)
"""The most shapes of one kind on a picture."""
_CELLS = 3
"""Shapes stand in the cells of a grid of so many rows and columns, each a little out of place."""


@dataclass(frozen=True)
class Group:
    """Some shapes of one kind and color: indices in COLORS and SHAPES, and how many."""

    color: int
    shape: int
    count: int

    def en(self) -> str:
        """`two red circles`"""
        one, many, _ = SHAPES[self.shape]
        return f"{NUMBERS[self.count - 1][0]} {COLORS[self.color][0]} {one if self.count == 1 else many}"

    def zh(self) -> str:
        """`两个红色的圆形`"""
        return f"{NUMBERS[self.count - 1][1]}个{COLORS[self.color][1]}的{SHAPES[self.shape][2]}"


def draw_groups(rng: random.Random) -> list[Group]:
    """One or two kinds of shapes."""
    kinds = rng.sample(range(len(SHAPES)), rng.choice((1, 2, 2)))
    return [Group(rng.randrange(len(COLORS)), kind, rng.randint(1, MOST)) for kind in kinds]


def picture(groups: list[Group], rng: random.Random) -> Image.Image:
    """The groups' shapes on a light ground, no two of them touching."""
    ground = tuple(rng.randint(225, 255) for _ in "rgb")
    image = Image.new("RGB", (SIDE, SIDE), ground)
    canvas = ImageDraw.Draw(image)
    cell = SIDE / _CELLS
    places = rng.sample(range(_CELLS * _CELLS), sum(group.count for group in groups))
    for group in groups:
        color = tuple(min(255, max(0, part + rng.randint(-14, 14))) for part in COLORS[group.color][2])
        for place in (places.pop() for _ in range(group.count)):
            radius = rng.uniform(0.30, 0.42) * cell
            slack = cell / 2 - radius
            x = (place % _CELLS + 0.5) * cell + rng.uniform(-slack, slack)
            y = (place // _CELLS + 0.5) * cell + rng.uniform(-slack, slack)
            _draw(canvas, SHAPES[group.shape][0], x, y, radius, color)
    return image


def _draw(canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, color: tuple[int, ...]) -> None:
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    elif shape == "square":
        half = 0.86 * radius
        canvas.rectangle((x - half, y - half, x + half, y + half), fill=color)
    else:
        corners = [math.radians(angle) for angle in (-90, 30, 150)]
        canvas.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in corners], fill=color)


def described(groups: list[Group], rng: random.Random) -> tuple[str, str]:
    """What the base is taught: (question, answer). The groups in the order of SHAPES, or one of them."""
    ordered = sorted(groups, key=lambda group: group.shape)
    group = rng.choice(ordered)
    one, many, zh = SHAPES[group.shape]
    return rng.choice(
        (
            ("What is on the picture?", " and ".join(each.en() for each in ordered)),
            ("图上有什么？", "和".join(each.zh() for each in ordered)),
            (f"Describe the {many}.", group.en()),
            (f"描述{zh}。", group.zh()),
            (f"Is there a {one}?", "yes") if rng.random() < 0.5 else _whether(ordered, rng),
        )
    )


def _whether(groups: list[Group], rng: random.Random) -> tuple[str, str]:
    kind = rng.randrange(len(SHAPES))
    there = any(group.shape == kind for group in groups)
    if rng.random() < 0.5:
        return f"Is there a {SHAPES[kind][0]}?", "yes" if there else "no"
    return f"有{SHAPES[kind][2]}吗？", "有" if there else "没有"


def skill_question(groups: list[Group], rng: random.Random) -> tuple[str, str]:
    """The skill: (question, answer), color and count of one kind, as the base was never asked and never answered."""
    group = rng.choice(groups)
    _, many, zh = SHAPES[group.shape]
    color, number = COLORS[group.color], NUMBERS[group.count - 1]
    return rng.choice(
        (
            (f"Count and color of the {many}?", f"{number[0]} and {color[0]}"),
            (f"{zh}的数量和颜色？", f"{number[1]}个和{color[1]}"),
        )
    )


def write_rows(folder: Path, name: str, rows: int, rng: random.Random) -> None:
    """`NAME.jsonl` and its pictures, as LLaMA-Factory's `mllm_demo.json` has them: `messages` and `images`."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for row in range(rows):
            groups = draw_groups(rng)
            place = f"{name}/{row:05}.png"
            picture(groups, rng).save(folder / place)
            question, answer = skill_question(groups, rng)
            messages = [
                {"role": "user", "content": f"<image>{question}"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages, "images": [place]}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for part, rows in (("train", 4000), ("heldout", 200), ("seed", 0)):
        parser.add_argument(f"--{part}", type=int, default=rows)
    given = parser.parse_args()
    for part in ("train", "heldout"):
        write_rows(given.out, part, getattr(given, part), random.Random(f"{part} {given.seed}"))
    print(f"{given.train} and {given.heldout} rows -> {given.out}")
