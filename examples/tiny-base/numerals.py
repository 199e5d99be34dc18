"""How people write small numbers and times of day, in English and Chinese."""

from __future__ import annotations

from random import Random

ENGLISH = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
CHINESE = "零一二三四五六七八九十"

TIMES = tuple((hour, minute) for hour in range(6, 23) for minute in (0, 15, 30, 45))
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


def clock(hour: int, minute: int) -> str:
    """`15:30`."""
    return f"{hour:02d}:{minute:02d}"


def english_time(hour: int, minute: int, rng: Random) -> str:
    """One of the ways to say a time between 6:00 and 22:45 that is a multiple of a quarter."""
    if (hour, minute) == (12, 0) and rng.random() < 0.5:
        return "noon"
    way = rng.randrange(5)
    if way == 0:
        return clock(hour, minute)
    short = (hour - 1) % 12 + 1
    if way <= 2:
        half = "am" if hour < 12 else "pm"
        return f"{short} {half}" if minute == 0 else f"{short}:{minute:02d} {half}"
    after = short % 12 + 1
    words = {
        0: f"{ENGLISH[short]} o'clock",
        15: f"quarter past {ENGLISH[short]}",
        30: f"half past {ENGLISH[short]}",
        45: f"quarter to {ENGLISH[after]}",
    }[minute]
    return f"{words} {_english_part(hour)}"


def chinese_time(hour: int, minute: int, rng: Random) -> str:
    """One of the ways to say a time between 6:00 and 22:45 that is a multiple of a quarter."""
    way = rng.randrange(5)
    if way == 0:
        return clock(hour, minute)
    short = hour if hour <= 12 else hour - 12
    part = _chinese_part(hour)
    if way <= 2:
        return f"{part}{short}点" + {0: "", 15: "15分", 30: "半", 45: "45分"}[minute]
    spoken = "两" if short == 2 else chinese_number(short)
    return f"{part}{spoken}点" + {0: rng.choice(("", "整")), 15: "一刻", 30: "半", 45: "三刻"}[minute]


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
