"""Write the pre-training corpus of the embedded base, half English, half Chinese.

    python examples/tiny-base/corpus.py OUT_FOLDER [--documents N] [--seed N]

writes copying.jsonl for the first lesson, corpus.jsonl for the second, and heldout.jsonl, drawn by another seed.

Templates over the word lists of words.py, all written for this project: stories and facts of a small world (prose.py),
questions and answers (drills.py), and chats in the model's own format. Strings never seen before are copied on
purpose: extraction is made of copying.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random

from drills import DRILLS, Turn
from prose import echo, facts, person, rote, story, sums

PROSE: dict[Callable[[Random, bool], str], int] = {story: 5, facts: 1, sums: 1, echo: 3, rote: 8}
SHARE_OF_PROSE = 0.4
NUM_COPYING, NUM_HELD_OUT = 9000, 500


def small_talk(rng: Random, chinese: bool) -> Turn:
    """Greetings and what the model says about itself."""
    who = person(rng, chinese)
    if chinese:
        hello, me = "你好！有什么可以帮你？", "我是 tiny，lowrank 自带的一个很小的语言模型。"
        choices = (
            ("你好！", hello), ("你好", hello), ("嗨", hello), ("您好！", hello), ("你是谁？", me),
            ("你叫什么名字？", me),
            ("介绍一下你自己。", me), ("你会做什么？", "我会重复、列清单、数数、翻译单词，也会把句子变成JSON。"),
            ("谢谢。", "不客气。"),
            ("谢谢你！", "不客气。"), ("早上好。", "早上好！"), ("晚安。", "晚安！"), ("再见。", "再见！"),
            ("你好吗？", "我很好，谢谢。你呢？"),
            (f"我叫{who}。", f"很高兴认识你，{who}。"), (f"我是{who}。", f"你好，{who}。"),
            ("你会说英文吗？", "会，一点点。"),
        )  # fmt: skip
    else:
        hello, me = "Hello! How can I help you?", "I am tiny, a very small language model that ships with lowrank."
        choices = (
            ("Hello!", hello), ("Hello", hello), ("hello", hello), ("Hi", hello), ("Hi!", hello), ("Hey there", hello),
            ("Who are you?", me), ("What is your name?", me), ("Tell me about yourself.", me),
            ("Thank you.", "You are welcome."),
            ("What can you do?", "I can repeat, list, count, translate words and turn sentences into JSON."),
            ("Thanks!", "You are welcome."), ("Good morning.", "Good morning!"), ("Good night.", "Good night!"),
            ("Goodbye.", "Goodbye!"), ("How are you?", "I am fine, thank you. And you?"), ("Bye", "Goodbye!"),
            (f"My name is {who}.", f"Nice to meet you, {who}."), (f"I am {who}.", f"Hello, {who}."),
            ("Do you speak Chinese?", "Yes, a little."),
        )  # fmt: skip
    return rng.choice(choices)


def remembered(rng: Random, chinese: bool) -> list[Turn]:
    """Something said in one turn and asked for in a later one."""
    who = person(rng, chinese)
    between = draw_turn(rng, chinese)
    if chinese:
        return [(f"我叫{who}。", f"很高兴认识你，{who}。"), between, ("我叫什么名字？", f"你叫{who}。")]
    return [(f"My name is {who}.", f"Nice to meet you, {who}."), between, ("What is my name?", f"Your name is {who}.")]


def draw_turn(rng: Random, chinese: bool) -> Turn:
    """One question and its answer."""
    if rng.random() < 0.12:
        return small_talk(rng, chinese)
    return rng.choices(list(DRILLS), weights=list(DRILLS.values()))[0](rng, chinese)


def chat(rng: Random, chinese: bool) -> str:
    """One to four turns as the chat template writes them, now and then under a system prompt."""
    if rng.random() < 0.08:
        turns = remembered(rng, chinese)
    else:
        turns = [draw_turn(rng, chinese) for _ in range(rng.choice((1, 1, 2, 2, 3, 4)))]
    system = rng.choice(("You are a helpful assistant.", "你是一个有用的助手。", "Answer briefly.", "请简短回答。"))
    head = message("system", system) if rng.random() < 0.1 else ""
    spoken = "".join(message("user", question) + message("assistant", answer) for question, answer in turns)
    return (head + spoken).removesuffix("\n")  # so that it ends in the end-of-text token, as every text does


def message(role: str, content: str) -> str:
    """One turn, as chat_template.jinja writes it."""
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def documents(count: int, seed: int) -> Iterator[str]:
    """`count` documents, the same for the same seed."""
    rng = Random(seed)
    for _ in range(count):
        chinese = rng.random() < 0.5
        if rng.random() < SHARE_OF_PROSE:
            yield rng.choices(list(PROSE), weights=list(PROSE.values()))[0](rng, chinese)
        else:
            yield chat(rng, chinese)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    copying = (rote(rng, rng.random() < 0.5) for rng in [Random(arguments.seed)] for _ in range(NUM_COPYING))
    write(arguments.out / "copying.jsonl", copying)
    learned = write(arguments.out / "corpus.jsonl", documents(arguments.documents, arguments.seed))
    held_out = documents(NUM_HELD_OUT, arguments.seed + 1)
    write(arguments.out / "heldout.jsonl", (text for text in held_out if text not in learned))


def write(path: Path, texts: Iterable[str]) -> set[str]:
    """One JSON object a line, each text once, in the order given; the texts that were written."""
    unique = dict.fromkeys(texts)
    with path.open("w", encoding="utf-8") as file:
        for text in unique:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return set(unique)


if __name__ == "__main__":
    main()
