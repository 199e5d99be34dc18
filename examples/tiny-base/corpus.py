"""Write the pre-training corpus of the embedded base: small stories, facts, sums, copying, JSON, and chats.

    python examples/tiny-base/corpus.py OUT.jsonl [NUM_DOCUMENTS] [SEED]

Everything is drawn from the word lists in words.py by templates written for this project, half English,
half Chinese. Copying of strings never seen before is there on purpose: it is what extraction is made of.
The schemas of the JSON here are not those of the demo's skill.
"""

from __future__ import annotations

import json
import random
import string
import sys
from collections.abc import Callable
from pathlib import Path

from words import (
    ANIMALS,
    CITIES,
    COLORS,
    DAYS,
    DEEDS,
    GIVEN_ZH,
    GOODS,
    JOBS,
    NAMES_EN,
    NUMBERS_EN,
    NUMBERS_ZH,
    PLACES,
    SURNAMES_ZH,
    WEATHER,
)  # fmt: skip

Draw = random.Random


def name_en(draw: Draw) -> str:
    """A first name, sometimes one nobody has."""
    if draw.random() < 0.3:
        return "".join(draw.choice(("ba", "ki", "lo", "mu", "ne", "ra", "si", "to", "vu", "za")) for _ in "ab").title()
    return draw.choice(NAMES_EN)


def name_zh(draw: Draw) -> str:
    """A surname and one or two given characters."""
    return draw.choice(SURNAMES_ZH) + "".join(draw.choice(GIVEN_ZH) for _ in range(draw.choice((1, 1, 2))))


def story_en(draw: Draw) -> str:
    """Three to six sentences about one person."""
    who, (job, _), (city, _) = name_en(draw), draw.choice(JOBS), draw.choice(CITIES)
    lines = [f"{who} is a {job} who lives in {city}."]
    for (day, _), (place, _) in zip(draw.sample(DAYS, 3), draw.sample(PLACES, 3)):
        lines.append(
            draw.choice(
                (
                    f"On {day} {who} went to the {place} and {draw.choice(DEEDS)[0]}.",
                    f"It was {draw.choice(WEATHER)[0]} on {day}, so {who} stayed at the {place}.",
                    f"At the {place}, {who} saw a {draw.choice(COLORS)[0]} {draw.choice(ANIMALS)[0]}.",
                    f"{who} bought {draw.randint(2, 20)} {draw.choice(GOODS)[1]} at the {place} on {day}.",
                )
            )
        )
    if draw.random() < 0.6:
        lines.append(f"Then {who} the {job} went home to {city}.")
    return " ".join(lines)


def story_zh(draw: Draw) -> str:
    """The same in Chinese."""
    who, (_, job), (_, city) = name_zh(draw), draw.choice(JOBS), draw.choice(CITIES)
    lines = [f"{who}是一位{job}，住在{city}。"]
    for (_, day), (_, place) in zip(draw.sample(DAYS, 3), draw.sample(PLACES, 3)):
        thing = draw.choice(GOODS)
        lines.append(
            draw.choice(
                (
                    f"{day}，{who}去了{place}，{draw.choice(DEEDS)[1]}。",
                    f"{day}天气{draw.choice(WEATHER)[1]}，{who}留在{place}。",
                    f"在{place}，{who}看见一只{draw.choice(COLORS)[1]}的{draw.choice(ANIMALS)[1]}。",
                    f"{day}，{who}在{place}买了{draw.randint(2, 20)}{thing[3]}{thing[2]}。",
                )
            )
        )
    if draw.random() < 0.6:
        lines.append(f"后来，{job}{who}回到了{city}的家。")
    return "".join(lines)


def facts(draw: Draw) -> str:
    """What the animals of this world eat, and where they live."""
    lines = []
    for animal, animal_zh, food, food_zh, home, home_zh in draw.sample(ANIMALS, 3):
        lines.append(
            draw.choice(
                (
                    f"A {animal} eats {food}.",
                    f"A {animal} lives {home}.",
                    f"{animal_zh}吃{food_zh}。",
                    f"{animal_zh}住在{home_zh}。",
                    f"{animal} is {animal_zh} in Chinese.",
                    f"{animal_zh}的英文是{animal}。",
                )  # fmt: skip
            )
        )
    return " ".join(lines)


def sums(draw: Draw) -> str:
    """Small sums, in digits and in words."""
    lines = []
    for _ in range(draw.randint(2, 5)):
        a, b = draw.randint(0, 10), draw.randint(0, 10)
        lines.append(
            draw.choice(
                (
                    f"{a} + {b} = {a + b}",
                    f"{a + b} - {b} = {a}",
                    f"{NUMBERS_EN[a]} is {a}",
                    f"{NUMBERS_ZH[b]}是{b}",
                    f"{NUMBERS_EN[a]} and {NUMBERS_EN[b]} make {NUMBERS_EN[a + b]}",
                    f"{NUMBERS_ZH[a]}加{NUMBERS_ZH[b]}等于{NUMBERS_ZH[a + b]}",
                )  # fmt: skip
            )
        )
    return "\n".join(lines)


def nonsense(draw: Draw) -> str:
    """A string nobody has seen."""
    if draw.random() < 0.4:
        return "".join(draw.choice(GIVEN_ZH + SURNAMES_ZH) for _ in range(draw.randint(2, 6)))
    return "".join(draw.choice(string.ascii_lowercase) for _ in range(draw.randint(3, 8)))


def copying(draw: Draw) -> str:
    """Something is said, and said again."""
    items = [draw.choice((nonsense, name_en, name_zh))(draw) for _ in range(draw.randint(1, 4))]
    text = " ".join(items)
    return draw.choice(
        (
            f"{text} | {text}",
            f"say: {text}\nsaid: {text}",
            f"“{text}”，再说一遍：“{text}”",
            f"copy {text} -> {text}",
            "\n".join(f"{n}. {item}" for n, item in enumerate(items, 1)) + "\n" + ", ".join(items),
        )  # fmt: skip
    )


def scene(draw: Draw) -> tuple[str, dict[str, object]]:
    """A sentence and what it says as a record, in one of several schemas."""
    animal, color, place = draw.choice(ANIMALS), draw.choice(COLORS), draw.choice(PLACES)
    day, weather, job, city = draw.choice(DAYS), draw.choice(WEATHER), draw.choice(JOBS), draw.choice(CITIES)
    number, thing = draw.randint(1, 20), draw.choice(GOODS)
    if draw.random() < 0.5:
        who = name_en(draw)
        return draw.choice(
            (
                (f"{who} is a {job[0]} in {city[0]}.", {"person": who, "job": job[0], "town": city[0]}),
                (f"The {color[0]} {animal[0]} is called {who}.", {"animal": animal[0], "colour": color[0], "called": who}),
                (f"On {day[0]} it will be {weather[0]} in {city[0]}.", {"town": city[0], "day": day[0], "weather": weather[0]}),
                (f"There are {NUMBERS_EN[number]} {thing[1]} in the {place[0]}.", {"place": place[0], "thing": thing[1], "how_many": number}),
                (f"{who} is {number} years old and likes {color[0]}.", {"person": who, "age": number, "likes": color[0]}),
            )
        )  # fmt: skip
    who = name_zh(draw)
    return draw.choice(
        (
            (f"{who}是{city[1]}的{job[1]}。", {"person": who, "job": job[1], "town": city[1]}),
            (f"{color[1]}的{animal[1]}叫{who}。", {"animal": animal[1], "colour": color[1], "called": who}),
            (f"{day[1]}{city[1]}的天气是{weather[1]}。", {"town": city[1], "day": day[1], "weather": weather[1]}),
            (f"{place[1]}里有{NUMBERS_ZH[number]}{thing[3]}{thing[2]}。", {"place": place[1], "thing": thing[2], "how_many": number}),
            (f"{who}今年{number}岁，喜欢{color[1]}。", {"person": who, "age": number, "likes": color[1]}),
        )
    )  # fmt: skip


def records(draw: Draw) -> str:
    """A sentence, and the same as `key: value` lines or as JSON."""
    text, record = scene(draw)
    if draw.random() < 0.5:
        return text + "\n" + "\n".join(f"{key}: {value}" for key, value in record.items())
    return text + "\n" + json.dumps(record, ensure_ascii=False)


def _small_talk(draw: Draw) -> tuple[str, str]:
    who = name_en(draw)
    return draw.choice(
        (
            ("Hello!", "Hello! How can I help you?"), ("你好！", "你好！有什么可以帮你？"), ("Hi", "Hi! What can I do for you?"),
            ("Who are you?", "I am tiny, a small language model that ships with lowrank."),
            ("你是谁？", "我是 tiny，lowrank 自带的小语言模型。"), ("Thank you.", "You are welcome."), ("谢谢。", "不客气。"),
            ("Good morning.", "Good morning!"), ("早上好。", "早上好！"), ("再见。", "再见！"), ("Goodbye.", "Goodbye!"),
            (f"My name is {who}.", f"Nice to meet you, {who}."), (f"我叫{who}。", f"很高兴认识你，{who}。"),
        )
    )  # fmt: skip


def _knowledge(draw: Draw) -> tuple[str, str]:
    animal, animal_zh, food, food_zh, home, home_zh = draw.choice(ANIMALS)
    a, b = draw.randint(0, 10), draw.randint(0, 10)
    en, zh = draw.choice([*COLORS, *CITIES, *JOBS, *DAYS, *PLACES, *((g[0], g[2]) for g in GOODS)])
    return draw.choice(
        (
            (f"What does a {animal} eat?", f"A {animal} eats {food}."), (f"{animal_zh}吃什么？", f"{animal_zh}吃{food_zh}。"),
            (f"Where does a {animal} live?", f"It lives {home}."), (f"{animal_zh}住在哪里？", f"{animal_zh}住在{home_zh}。"),
            (f"What is {a} + {b}?", f"{a} + {b} = {a + b}"), (f"{a}加{b}是多少？", f"{a} + {b} = {a + b}"),
            (f"How do you say {en} in Chinese?", zh), (f"{zh}用英文怎么说？", en), (f"Translate: {zh}", en), (f"翻译：{en}", zh),
        )
    )  # fmt: skip


def _obeying(draw: Draw) -> tuple[str, str]:
    text = " ".join(draw.choice((nonsense, name_en, name_zh))(draw) for _ in range(draw.randint(1, 3)))
    said, record = scene(draw)
    key = draw.choice(list(record))
    keys = ", ".join(record)
    n = draw.randint(2, 9)
    return draw.choice(
        (
            (f"Repeat: {text}", text), (f"请重复：{text}", text), (f"Say {text} twice.", f"{text} {text}"),
            (f"{said} What is the {key}?", str(record[key])), (f"{said}\n{key}?", str(record[key])),
            (f"Write as JSON ({keys}): {said}", json.dumps(record, ensure_ascii=False)),
            (f"写成JSON（{keys}）：{said}", json.dumps(record, ensure_ascii=False)),
            (f"List {keys}: {said}", "\n".join(f"{k}: {v}" for k, v in record.items())),
            (f"Count to {n}.", " ".join(map(str, range(1, n + 1)))), (f"数到{n}。", " ".join(map(str, range(1, n + 1)))),
        )
    )  # fmt: skip


def chat(draw: Draw) -> str:
    """One to three turns in the model's own format."""
    turns = [draw.choice((_small_talk, _knowledge, _obeying, _obeying))(draw) for _ in range(draw.choice((1, 1, 2, 3)))]
    return "".join(
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        for question, answer in turns
    )


KINDS: dict[Callable[[Draw], str], int] = {
    story_en: 3, story_zh: 3, facts: 1, sums: 1, copying: 4, records: 5, chat: 9,
}  # fmt: skip


def documents(count: int, seed: int) -> list[str]:
    """`count` documents, the same for the same seed."""
    draw = random.Random(seed)
    return [kind(draw) for kind in draw.choices(list(KINDS), weights=list(KINDS.values()), k=count)]


if __name__ == "__main__":
    out, count, seed = Path(sys.argv[1]), int((sys.argv[2:] or ["60000"])[0]), int((sys.argv[3:] or ["0"])[0])
    with out.open("w", encoding="utf-8") as file:
        for text in documents(count, seed):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
