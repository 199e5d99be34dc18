"""How people write small numbers and times of day, in English and Chinese."""

from __future__ import annotations

from random import Random

ENGLISH = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
CHINESE = "零一二三四五六七八九十"

TIMES = tuple((hour, minute) for hour in range(7, 22) for minute in (0, 30))
"""(hour, minute) of the times people talk about here."""


def english_number(number: int) -> str:
    """0 to 99: `twenty-four`."""
    if number <= 20:
        return ENGLISH[number]
    tens = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")[number // 10 - 2]
    return tens if number % 10 == 0 else f"{tens}-{ENGLISH[number % 10]}"


def chinese_number(number: int) -> str:
    """0 to 99: `二十四`."""
    if number <= 10:
        return CHINESE[number]
    tens, ones = divmod(number, 10)
    return ("" if tens == 1 else CHINESE[tens]) + "十" + (CHINESE[ones] if ones else "")


def counting_word(number: int) -> str:
    """The number before a measure word: 两 for 2."""
    return "两" if number == 2 else chinese_number(number)


def several_english(count: int, noun: str, unit: str, rng: Random) -> str:
    """`three boxes of green tea`, `half a dozen towels`, `a couple of mugs`; no `unit`: the noun itself is counted."""
    many = f"{plural(unit)} of {noun}" if unit else plural(noun)
    if count == 1:
        return f"{rng.choice(('one', '1'))} {f'{unit} of {noun}' if unit else noun}"
    special = {2: ("a couple of", "a pair of"), 6: ("half a dozen",), 12: ("a dozen",), 24: ("two dozen",)}.get(count)
    if special and rng.random() < 0.5:
        return f"{rng.choice(special)} {many}"
    return f"{rng.choice((str(count), english_number(count)))} {many}"


def several_chinese(count: int, noun: str, measure: str, rng: Random, *, by_dozen: bool) -> str:
    """`三盒绿茶`, `12个苹果`, and where things are sold by the dozen `半打毛巾`."""
    special = {2: "一对", 6: "半打", 12: "一打", 24: "两打"}.get(count)
    if special and by_dozen and rng.random() < 0.5:
        return special + noun
    return rng.choice((str(count), counting_word(count))) + measure + noun


def plural(noun: str) -> str:
    """Regular English plurals."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


def clock(hour: int, minute: int) -> str:
    """`15:30`."""
    return f"{hour:02d}:{minute:02d}"


def english_time(hour: int, minute: int, rng: Random) -> str:
    """One of the ways to say a time of TIMES."""
    if (hour, minute) == (12, 0) and rng.random() < 0.5:
        return "noon"
    way = rng.randrange(5)
    if way == 0:
        return clock(hour, minute)
    short = (hour - 1) % 12 + 1
    if way <= 2:
        half = "am" if hour < 12 else "pm"
        return f"{short} {half}" if minute == 0 else f"{short}:{minute:02d} {half}"
    words = f"half past {ENGLISH[short]}" if minute else f"{ENGLISH[short]} o'clock"
    return f"{words} {_english_part(hour)}"


def chinese_time(hour: int, minute: int, rng: Random) -> str:
    """One of the ways to say a time of TIMES."""
    way = rng.randrange(5)
    if way == 0:
        return clock(hour, minute)
    short = hour if hour <= 12 else hour - 12
    part = _chinese_part(hour)
    if way <= 2:
        return f"{part}{short}点" + ("半" if minute else "")
    spoken = "两" if short == 2 else chinese_number(short)
    return f"{part}{spoken}点" + ("半" if minute else rng.choice(("", "整")))


def _english_part(hour: int) -> str:
    if hour < 12:
        return "in the morning"
    return "in the afternoon" if hour < 18 else "in the evening"


def _chinese_part(hour: int) -> str:
    if hour < 9:
        return "早上"
    if hour < 12:
        return "上午"
    if hour == 12:
        return "中午"
    return "下午" if hour < 18 else "晚上"
