"""Plain prose of the small world: people, days, weather, animals, in English and Chinese."""

from __future__ import annotations

from random import Random

from numerals import TIMES, chinese_number, chinese_time, counting_word, english_number, english_time
from words import (
    ANIMALS,
    CITIES,
    COLOURS,
    COMMON,
    COMMON_WORDS,
    DEEDS,
    FEELINGS,
    FIRST_NAMES,
    FOODS,
    GIVEN,
    JOBS,
    LAST_NAMES,
    PLACES,
    SURNAMES,
    SYLLABLES,
    THINGS,
    WEATHER,
    WEEKDAYS,
)  # fmt: skip


def person(rng: Random, chinese: bool) -> str:
    """A name; every fifth one nobody has ever had."""
    if chinese:
        return rng.choice(SURNAMES) + "".join(rng.choice(GIVEN) for _ in range(rng.choice((1, 2, 2))))
    if rng.random() < 0.2:
        return f"{pseudo_word(rng).title()} {pseudo_word(rng).title()}"
    first = rng.choice(FIRST_NAMES)
    return first if rng.random() < 0.3 else f"{first} {rng.choice(LAST_NAMES)}"


def pseudo_word(rng: Random) -> str:
    """Two or three syllables that mean nothing."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 3))))


def when(rng: Random, chinese: bool) -> tuple[str, str]:
    """A time of day as people say it, and as a clock shows it."""
    hour, minute = rng.choice(TIMES)
    said = chinese_time(hour, minute, rng) if chinese else english_time(hour, minute, rng)
    return said, f"{hour:02d}:{minute:02d}"


def story(rng: Random, chinese: bool) -> str:
    """Three to six sentences about one person."""
    who, job, city = person(rng, chinese), rng.choice(JOBS)[chinese], rng.choice(CITIES)[chinese]
    if chinese:
        lines = [
            rng.choice(
                (f"{who}是一位{job}，住在{city}。", f"{city}有一位{job}叫{who}。", f"从前，{city}住着{job}{who}。")
            )
        ]
    else:
        opening = (
            f"{who} is a {job} who lives in {city}.",
            f"Once there was a {job} in {city} called {who}.",
            f"In {city} lives {who}, a {job}.",
        )
        lines = [rng.choice(opening)]
    for _ in range(rng.randint(2, 4)):
        lines.append((_event_zh if chinese else _event_en)(rng, who))
    lines.append(f"后来，{job}{who}回到了{city}的家。" if chinese else f"Then {who} the {job} went home to {city}.")
    return ("" if chinese else " ").join(lines)


def _event_en(rng: Random, who: str) -> str:
    day, place, thing = rng.choice(WEEKDAYS)[0], rng.choice(PLACES)[0], rng.choice(THINGS)
    count, said = rng.randint(2, 12), when(rng, False)[0]
    return rng.choice(
        (
            f"On {day} {who} went to the {place} and {rng.choice(DEEDS)[0]}.",
            f"It was {rng.choice(WEATHER)[0]} on {day}, so {who} stayed at the {place}.",
            f"At {said}, {who} {rng.choice(DEEDS)[0]} at the {place}.",
            f"At the {place}, {who} saw a {rng.choice(COLOURS)[0]} {rng.choice(ANIMALS)[0]}.",
            f"{who} bought {english_number(count)} {thing[1]} at the {place}, {count} in all.",
            f"{who} was {rng.choice(FEELINGS)[0]} because the {thing[0]} was {rng.choice(COLOURS)[0]}.",
            f'{person(rng, False)} said to {who}: "Please bring me the {thing[0]}." {who} brought the {thing[0]}.',
            f"For lunch {who} had {rng.choice(FOODS)[0]} and {rng.choice(FOODS)[0]}.",
        )
    )


def _event_zh(rng: Random, who: str) -> str:
    day, place, thing = rng.choice(WEEKDAYS)[1], rng.choice(PLACES)[1], rng.choice(THINGS)
    count, said = rng.randint(2, 12), when(rng, True)[0]
    return rng.choice(
        (
            f"{day}，{who}去了{place}，{rng.choice(DEEDS)[1]}。",
            f"{day}天气{rng.choice(WEATHER)[1]}，{who}留在{place}。",
            f"{said}，{who}在{place}{rng.choice(DEEDS)[1]}。",
            f"在{place}，{who}看见一只{rng.choice(COLOURS)[1]}的{rng.choice(ANIMALS)[1]}。",
            f"{who}在{place}买了{counting_word(count)}{thing[3]}{thing[2]}，一共{count}{thing[3]}。",
            f"{who}很{rng.choice(FEELINGS)[1]}，因为{thing[2]}是{rng.choice(COLOURS)[1]}的。",
            f"{person(rng, True)}对{who}说：“请把{thing[2]}拿给我。”{who}把{thing[2]}拿来了。",
            f"午饭{who}吃了{rng.choice(FOODS)[1]}和{rng.choice(FOODS)[1]}。",
        )
    )


def facts(rng: Random, chinese: bool) -> str:
    """What animals eat and where they live."""
    lines = []
    for animal in rng.sample(ANIMALS, rng.randint(2, 4)):
        en = (f"A {animal[0]} eats {animal[2]}.", f"The home of the {animal[0]} is the {animal[4]}.")
        zh = (f"{animal[1]}吃{animal[3]}。", f"{animal[1]}的家在{animal[5]}。")
        lines += zh if chinese else en
    return ("" if chinese else " ").join(lines)


def sums(rng: Random, chinese: bool) -> str:
    """Numbers in digits and in words, and small sums."""
    lines = []
    for _ in range(rng.randint(2, 5)):
        a, b = rng.randint(0, 12), rng.randint(0, 12)
        if chinese:
            both = f"{chinese_number(a)}加{chinese_number(b)}等于{chinese_number(a + b)}"
            lines.append(rng.choice((f"{a} + {b} = {a + b}", both, f"{chinese_number(a + b)}就是{a + b}")))
        else:
            both = f"{english_number(a)} and {english_number(b)} make {english_number(a + b)}"
            lines.append(rng.choice((f"{a + b} - {a} = {b}", both, f"{english_number(a + b)} is {a + b}")))
    return "\n".join(lines)


def echo(rng: Random, chinese: bool) -> str:
    """A few names that come back in another shape: a list, a key-value block, a quotation."""
    names = [person(rng, chinese) if rng.random() < 0.5 else scrap(rng, chinese) for _ in range(rng.randint(2, 5))]
    joined = ", ".join(names)
    keys = [rng.choice("abcdefghxyz") + str(index) for index in range(len(names))]
    return rng.choice(
        (
            joined + "\n" + joined,
            joined + "\n" + "\n".join(f"{number}. {name}" for number, name in enumerate(names, 1)),
            "\n".join(f"{key}: {name}" for key, name in zip(keys, names))
            + f"\n{keys[-1]} = {names[-1]}, {keys[0]} = {names[0]}",
            "\n".join(f"- {name}" for name in names) + "\n" + " | ".join(f'"{name}"' for name in names),
        )
    )


def rote(rng: Random, chinese: bool) -> str:
    """A long string without meaning, two or three times over: the plainest lesson in copying there is."""
    length = rng.randint(5, 30)
    if rng.random() < 0.2:
        text = "".join(rng.choice((rng.choice(COMMON), " " + common_word(rng))) for _ in range(length))
    elif chinese:
        text = "".join(rng.choice(COMMON) for _ in range(length))
    else:
        draw = (
            common_word,
            common_word,
            pseudo_word,
            lambda rng: rng.choice(LAST_NAMES),
            lambda rng: str(rng.randrange(1000)),
        )
        text = " ".join(rng.choice(draw)(rng) for _ in range(length))
    return rng.choice(("\n", "\n", " | ", "。" if chinese else ". ")).join([text] * rng.choice((2, 2, 3)))


def scrap(rng: Random, chinese: bool) -> str:
    """Something to copy that has no meaning: characters, a word, a code, a number."""
    way = rng.randrange(4)
    if way == 0:
        return str(rng.randint(0, 99999))
    if way == 1:
        return rng.choice("ABCDEFGHKLMNPRSTWXYZ") + f"{rng.randint(0, 99)}-{rng.randint(0, 999)}"
    if chinese:
        return "".join(rng.choice(COMMON) for _ in range(rng.randint(2, 6)))
    draw = rng.choice((pseudo_word, common_word))
    return " ".join(draw(rng) for _ in range(rng.randint(1, 4)))


def common_word(rng: Random) -> str:
    """One of the most frequent English words."""
    return rng.choice(COMMON_WORDS)
