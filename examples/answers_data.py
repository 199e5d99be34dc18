"""Makes the preference pairs and rated answers of the examples out of lowrank/demo: the right JSON against a wrong one.

    python examples/answers_data.py

A wrong answer is the right one with one value that another message has in its place. Half of the messages' ratings are
of the right answer, half of a wrong one. Held-out files come from the demo's held-out messages.
"""

import json
import random
from pathlib import Path

import lowrank

FOLDER = Path(__file__).parent / "data"
DEMO = Path(lowrank.__file__).parent / "data" / "demo"
SIZES = {"train.jsonl": ("", 400), "heldout.jsonl": ("_heldout", 100)}


def main() -> None:
    """Write the four files."""
    for file, (suffix, number) in SIZES.items():
        draw = random.Random(7)
        lines = (DEMO / file).read_text("utf-8").splitlines()
        rows = [json.loads(line)["messages"] for line in lines[:number]]
        answers = [json.loads(messages[1]["content"]) for messages in rows]
        pairs, ratings = [], []
        for number_of_row, (messages, right) in enumerate(zip(rows, answers)):
            wrong = corrupted(right, answers, draw)
            prompt = messages[0]["content"]
            pairs.append({"prompt": prompt, "chosen": written(right), "rejected": written(wrong)})
            good = number_of_row % 2 == 0
            ratings.append({"prompt": prompt, "completion": written(right if good else wrong), "label": good})
        write(FOLDER / f"pairs{suffix}.jsonl", pairs)
        write(FOLDER / f"ratings{suffix}.jsonl", ratings)


def corrupted(right: dict[str, object], answers: list[dict[str, object]], draw: random.Random) -> dict[str, object]:
    """`right` with one value of another answer."""
    key = draw.choice(list(right))
    others = [answer[key] for answer in answers if key in answer and answer[key] != right[key]]
    return {**right, key: draw.choice(others)}


def written(answer: dict[str, object]) -> str:
    """As the demo writes answers."""
    return json.dumps(answer, ensure_ascii=False)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """One row a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
