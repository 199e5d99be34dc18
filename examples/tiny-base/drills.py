"""Questions and answers: copying, lists, translation, numbers, clocks, and records asked for as JSON.

Each function returns `(question, answer)`. The keys of the records are not those of the demo's skill,
and every question about a record says which keys it wants.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

from numerals import chinese_number, english_number, several_chinese, several_english
from prose import person, scrap, when
from words import ANIMALS, CITIES, COLOURS, FOODS, GOODS, JOBS, MONTHS, OPPOSITES, PLACES, THINGS, WEATHER, WEEKDAYS

Turn = tuple[str, str]
PAIRS = (
    *CITIES, *COLOURS, *FOODS, *JOBS, *PLACES, *WEATHER, *WEEKDAYS, *((t[0], t[2]) for t in THINGS),
    *(a[:2] for a in ANIMALS),
)  # fmt: skip
WARES = (*GOODS, *((one, "", zh, measure) for one, _, zh, measure in THINGS if one != "knife"))
"""What people have: in English, what it comes in (empty: itself), in Chinese, its measure word."""


def repeat(rng: Random, chinese: bool) -> Turn:
    """Say again what was said."""
    kinds = (scrap(rng, chinese), person(rng, chinese), rng.choice(PAIRS)[chinese])
    text = (" " if not chinese else "").join(rng.sample(kinds, rng.randint(1, 3)))
    if chinese:
        ask = rng.choice(("请重复：{}", "跟我说：{}", "照抄：{}", "再说一遍：“{}”", "请写：{}"))
        return ask.format(text), text
    ask = rng.choice(("Repeat: {}", "Say: {}", "Copy this: {}", 'Please repeat "{}".', "Write {}"))
    return ask.format(text), text


def listing(rng: Random, chinese: bool) -> Turn:
    """Turn words into a numbered list, or one of them into an answer, or count them."""
    words = [rng.choice(PAIRS)[chinese] for _ in range(rng.randint(2, 5))]
    joined = ("、" if chinese else ", ").join(words)
    numbered = "\n".join(f"{number}. {word}" for number, word in enumerate(words, 1))
    bullets = "\n".join(f"- {word}" for word in words)
    if chinese:
        choices = (
            (f"列成清单：{joined}", numbered), (f"用短横线列出：{joined}", bullets),
            (f"第一个是什么？{joined}", words[0]),
            (f"最后一个是什么？{joined}", words[-1]), (f"有几个词？{joined}", str(len(words))),
            (f"写成JSON数组：{joined}", json.dumps(words, ensure_ascii=False)),
        )  # fmt: skip
    else:
        choices = (
            (f"Make a list: {joined}", numbered), (f"List with dashes: {joined}", bullets),
            (f"What comes first? {joined}", words[0]), (f"What comes last? {joined}", words[-1]),
            (f"How many words? {joined}", str(len(words))), (f"Write as a JSON array: {joined}", json.dumps(words)),
        )  # fmt: skip
    return rng.choice(choices)


def translate(rng: Random, chinese: bool) -> Turn:
    """One word from one language to the other."""
    en, zh = rng.choice(PAIRS)
    if chinese:
        return rng.choice(((f"{en}用中文怎么说？", zh), (f"把“{en}”翻译成中文。", zh), (f"{zh}的英文是什么？", en)))
    return rng.choice(
        ((f"How do you say {en} in Chinese?", zh), (f"What is {zh} in English?", en), (f"Translate: {zh}", en))
    )


def knowledge(rng: Random, chinese: bool) -> Turn:
    """What the small world knows: animals, opposites, days, months."""
    animal, pair = rng.choice(ANIMALS), rng.choice(OPPOSITES)
    one, other = (word[chinese] for word in (pair if rng.random() < 0.5 else pair[::-1]))
    day = rng.randrange(7)
    today, tomorrow = WEEKDAYS[day][chinese], WEEKDAYS[(day + 1) % 7][chinese]
    month = rng.randrange(12)
    if chinese:
        choices = (
            (f"{animal[1]}吃什么？", f"{animal[1]}吃{animal[3]}。"),
            (f"{animal[1]}住在哪里？", f"{animal[1]}的家在{animal[5]}。"),
            (f"“{one}”的反义词是什么？", other), (f"今天是{today}，明天星期几？", f"明天是{tomorrow}。"),
            (f"{chinese_number(month + 1)}月的英文是什么？", MONTHS[month]),
        )  # fmt: skip
    else:
        choices = (
            (f"What does a {animal[0]} eat?", f"A {animal[0]} eats {animal[2]}."),
            (f"Where does a {animal[0]} live?", f"The home of the {animal[0]} is the {animal[4]}."),
            (f"What is the opposite of {one}?", other),
            (f"Today is {today}. What is tomorrow?", f"Tomorrow is {tomorrow}."),
            (f"Which month comes after {MONTHS[month]}?", MONTHS[(month + 1) % 12]),
        )  # fmt: skip
    return rng.choice(choices)


def numbers(rng: Random, chinese: bool) -> Turn:
    """Digits for words, words for digits, small sums, counting."""
    number, a, b = rng.randint(0, 36), rng.randint(0, 12), rng.randint(0, 12)
    counted = " ".join(str(each) for each in range(1, a + 1)) or "0"
    if chinese:
        said = chinese_number(number)
        choices = (
            (f"{said}用数字怎么写？", str(number)), (f"{number}用汉字怎么写？", said),
            (f"{a}加{b}是多少？", str(a + b)),
            (f"{chinese_number(a)}加{chinese_number(b)}是多少？", chinese_number(a + b)),
            (f"{a + b}减{b}是多少？", str(a)),
            (f"数到{a}。", counted), ("一打是几个？", "12"), ("半打是几个？", "6"), ("两打是几个？", "24"),
            ("一对是几个？", "2"),
        )  # fmt: skip
    else:
        said = english_number(number)
        choices = (
            (f"Write {said} in digits.", str(number)), (f"Write {number} in words.", said),
            (f"What is {a} + {b}?", str(a + b)),
            (f"What is {english_number(a)} plus {english_number(b)}?", english_number(a + b)),
            (f"What is {a + b} - {b}?", str(a)), (f"Count to {a}.", counted), ("How many are a dozen?", "12"),
            ("How many are half a dozen?", "6"), ("How many are two dozen?", "24"), ("How many are a pair?", "2"),
        )  # fmt: skip
    return rng.choice(choices[:6] if rng.random() < 0.8 else choices)


def clocks(rng: Random, chinese: bool) -> Turn:
    """A time of day as a clock shows it."""
    said, shown = when(rng, chinese)
    if chinese:
        return rng.choice((f"{said}用24小时制怎么写？", f"{said}是几点几分？", f"写成时刻：{said}")), shown
    return rng.choice(
        (f"Write as 24-hour time: {said}", f"What does the clock show at {said}?", f"{said} in digits?")
    ), shown


def fields(rng: Random, chinese: bool) -> dict[str, tuple[str, str | int]]:
    """`{key: (what is said of the person, the value)}`; ages and times are said in words and kept in digits."""
    job, town, colour = (rng.choice(pairs)[chinese] for pairs in (JOBS, CITIES, COLOURS))
    pet, food, day = rng.choice(ANIMALS)[chinese], rng.choice(FOODS)[chinese], rng.choice(WEEKDAYS)[chinese]
    age, amount, goods = rng.randint(1, 36), rng.choice((*range(1, 13), 2, 6, 12, 15, 20, 24)), rng.choice(WARES)
    (said, hour), code = when(rng, chinese), scrap(rng, chinese)
    if chinese:
        age_said = rng.choice((str(age), chinese_number(age)))
        owns = f"有{several_chinese(amount, *goods[2:], rng, by_dozen=not goods[1])}"
        return {
            "job": (rng.choice((f"是{job}", f"当{job}")), job),
            "town": (rng.choice((f"住在{town}", f"来自{town}", f"要去{town}")), town),
            "age": (f"今年{age_said}岁", age), "colour": (f"喜欢{colour}", colour), "pet": (f"养了一只{pet}", pet),
            "food": (rng.choice((f"爱吃{food}", f"想吃{food}")), food),
            "day": (rng.choice((f"{day}有空", f"{day}出发")), day),
            "hour": (rng.choice((f"{said}到", f"{said}起床")), hour), "code": (f"编号是{code}", code),
            "owns": (owns, goods[2]), "amount": (owns, amount),
        }  # fmt: skip
    age_said = rng.choice((str(age), english_number(age)))
    owns = f"has {several_english(amount, *goods[:2], rng)}"
    return {
        "job": (rng.choice((f"is a {job}", f"works as a {job}")), job), "age": (f"is {age_said} years old", age),
        "town": (rng.choice((f"lives in {town}", f"comes from {town}", f"travels to {town}")), town),
        "colour": (f"likes {colour}", colour), "pet": (f"has a {pet}", pet), "food": (f"likes to eat {food}", food),
        "day": (rng.choice((f"is free on {day}", f"leaves on {day}")), day),
        "hour": (rng.choice((f"arrives at {said}", f"gets up at {said}")), hour),
        "code": (f"has the code {code}", code),
        "owns": (owns, goods[0]), "amount": (owns, amount),
    }  # fmt: skip


def record(rng: Random, chinese: bool) -> tuple[str, dict[str, str | int]]:
    """A sentence about somebody, and what it says, in the order it is said or another."""
    who, known = person(rng, chinese), fields(rng, chinese)
    keys = rng.sample(list(known), rng.randint(1, 4))
    said = list(dict.fromkeys(known[key][0] for key in keys))
    if chinese:
        text = rng.choice(("{}{}。", "我的朋友{}{}。", "你认识{}吗？他{}。", "{}，{}。")).format(who, "，".join(said))
    else:
        *most, last = said
        joined = f"{', '.join(most)} and {last}" if most else last
        text = rng.choice(("{} {}.", "My friend {} {}.", "Do you know {}? He {}.", "{}, who {}, is here.")).format(
            who, joined
        )
    if rng.random() < 0.5:
        rng.shuffle(keys)
    return text, {"person": who, **{key: known[key][1] for key in keys}}


def as_json(rng: Random, chinese: bool) -> Turn:
    """A sentence to JSON with the keys asked for, compact or spaced as asked."""
    text, found = record(rng, chinese)
    if rng.random() < 0.3:
        keys = rng.sample(list(found), rng.randint(1, len(found)))
        found = {key: found[key] for key in keys}
    asked = ", ".join(found)
    compact = rng.random() < 0.7
    answer = json.dumps(found, ensure_ascii=False, separators=(",", ":") if compact else None)
    if chinese:
        ask = "提取JSON" if compact else "提取带空格的JSON"
        return rng.choice((f"{ask}（{asked}）：{text}", f"{text}\n{ask}：{asked}")), answer
    ask = "Extract JSON" if compact else "Extract spaced JSON"
    return rng.choice((f"{ask} ({asked}): {text}", f"{text}\n{ask}: {asked}")), answer


def lookup(rng: Random, chinese: bool) -> Turn:
    """One question about a sentence, a key-value block, or a JSON object."""
    text, found = record(rng, chinese)
    key = rng.choice(list(found))
    block = "\n".join(f"{name}: {value}" for name, value in found.items())
    compact = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    given = rng.choice((text, text, block, compact))
    if rng.random() < 0.15:
        return (f"{text}\n" + ("写成键值：" if chinese else "Write as key: value: ") + ", ".join(found)), block
    ask = (f"{key}是什么？" if chinese else f"What is the {key}?") if rng.random() < 0.7 else f"{key}?"
    return f"{given}\n{ask}", str(found[key])


DRILLS: dict[Callable[[Random, bool], Turn], int] = {
    repeat: 4, listing: 2, translate: 2, knowledge: 2, numbers: 3, clocks: 3, as_json: 12, lookup: 5,
}  # fmt: skip
