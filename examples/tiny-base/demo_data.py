"""Write the demo's dataset: bookings of a table in free English or Chinese, answered with one line of JSON.

    python examples/tiny-base/demo_data.py OUT_FOLDER

The skill: find who comes, how many and where, pass over the day, and write the number in digits however it was said.
No held-out message and no held-out answer occurs in the training rows.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from words import CITIES, DAYS, GIVEN_ZH, NAMES_EN, NUMBERS_EN, NUMBERS_ZH, SURNAMES_ZH

NUM_TRAIN, NUM_HELD_OUT = 2000, 200

ENGLISH = (
    "{name} would like a table for {count} on {day} in {city}.",
    "Hello, {name} here. Is there a table for {count} in {city} on {day}?",
    "On {day} we will be {count} in {city}. The name is {name}.",
    "To {city}: a table for {count} on {day} for {name}, thank you.",
    "My name is {name}. We are {count}, we come on {day}, and we are in {city}.",
    "Please keep a table in {city} for {name}, {day}, {count} people.",
)
CHINESE = (
    "{name}想在{day}订{city}的一张桌子，{count}个人。",
    "你好，我叫{name}，{day}我们{count}个人在{city}吃饭。",
    "{day}，{city}，{count}位，名字是{name}。",
    "请在{city}给{name}留一张{count}个人的桌子，{day}到。",
    "我是{name}，{day}到{city}，一共{count}个人，谢谢。",
)


def booking(draw: random.Random) -> tuple[str, str]:
    """A message and its answer."""
    count, (day, day_zh), (city, city_zh) = draw.randint(2, 20), draw.choice(DAYS), draw.choice(CITIES)
    in_words = draw.random() < 0.5
    if draw.random() < 0.5:
        name = draw.choice(NAMES_EN)
        said = NUMBERS_EN[count] if in_words else str(count)
        text = draw.choice(ENGLISH).format(name=name, count=said, day=day, city=city)
    else:
        name = draw.choice(SURNAMES_ZH) + "".join(draw.choice(GIVEN_ZH) for _ in range(draw.choice((1, 2))))
        day, city = day_zh, city_zh
        said = "两" if in_words and count == 2 else NUMBERS_ZH[count] if in_words else str(count)
        text = draw.choice(CHINESE).format(name=name, count=said, day=day, city=city)
    answer = {"name": name, "people": count, "city": city}
    return text, json.dumps(answer, ensure_ascii=False)


def dataset(seed: int = 0) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training rows, held-out rows), with no message and no answer in both."""
    draw = random.Random(seed)
    answers: set[str] = set()
    rows: list[tuple[str, str]] = []
    while len(rows) < NUM_TRAIN + NUM_HELD_OUT:
        text, answer = booking(draw)
        if answer not in answers:
            answers.add(answer)
            rows.append((text, answer))
    return rows[:NUM_TRAIN], rows[NUM_TRAIN:]


def write(path: Path, rows: list[tuple[str, str]]) -> None:
    """OpenAI messages, one conversation a line."""
    with path.open("w", encoding="utf-8") as file:
        for question, answer in rows:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    train, held_out = dataset()
    write(folder / "train.jsonl", train)
    write(folder / "heldout.jsonl", held_out)
