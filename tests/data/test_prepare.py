"""From data settings to feeds: nothing lost unsaid, splits without leaks, mixing by weight, streams."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lowrank.data.batching.dataloader import DataLoader, StreamingDataLoader
from lowrank.data.config import DataConfig
from lowrank.data.prepare import Prepared, prepare
from lowrank.errors import DataError
from lowrank.records import Conversation, Preference, Rated, Text
from lowrank.segments import CHOSEN, REJECTED, Segment
from tests.data.made_tokenizers import tokenizer_of, trl_template

TOKENIZER = tokenizer_of("qwen2_5", trl_template("qwen2_5"))


def row(number: int, answer: str | None = None) -> dict[str, str]:
    return {"instruction": f"Say {number}", "output": f"{number} it is" if answer is None else answer}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows), encoding="utf-8")
    return str(path)


def run(seed: int = 0, record: type = Conversation, **settings: Any) -> Prepared:
    return prepare(DataConfig(**settings), tokenizer=TOKENIZER, record=record, seed=seed)


def texts_of(segments: Sequence[Segment]) -> list[str]:
    return [TOKENIZER.decode(segment.token_L) for segment in segments]


def epoch(prepared: Prepared) -> list[str]:
    """Every sample of one epoch, decoded."""
    steps = prepared.train.steps_per_epoch
    assert steps is not None
    return [text for _ in range(steps) for text in texts_of(prepared.train.next_step())]


def test_every_good_row_is_a_sample_and_every_other_is_counted(tmp_path: Path) -> None:
    bad = [row(90, ""), {"instruction": "x"}, row(91, " "), {"instruction": "x", "output": ["y"]}]
    path = write(tmp_path / "x.jsonl", [*map(row, range(20)), *bad, row(20)])
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"instruction": "cut')
    prepared = run(train=path, shuffle=False)
    assert isinstance(prepared.train, DataLoader)
    texts = epoch(prepared)
    assert [f"Say {number}<" in text for number, text in enumerate(texts)] == [True] * 21
    (dataset,) = prepared.report.datasets
    assert (dataset.read, dataset.used) == (26, 21)
    assert {finding.what: (finding.count, finding.rows) for finding in dataset.dropped} == {
        "empty answer": (2, ("row 21", "row 23")),
        "missing column 'output' (for response)": (1, ("row 22",)),
        "wrong type for response": (1, ("row 24",)),
        "broken JSON": (1, ("row 26",)),
    }
    assert len(prepared.report.losses) == 4
    assert set(prepared.report.losses) <= set(prepared.report.notices)


def test_strict_lists_every_loss(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [row(1), row(2, ""), row(3, "long " * 100), {"instruction": "x"}])
    settings = {"train": path, "max_length": 60}
    assert len(run(**settings).report.losses) == 3
    with pytest.raises(DataError, match=r"empty answer(.|\n)*row 4(.|\n)*row 3\) cut at data\.max_length, \d+ tokens"):
        run(**settings, strict=True)
    assert not run(train=write(tmp_path / "y.jsonl", [row(1)]), strict=True).report.losses


@pytest.mark.parametrize("streaming", [False, True])
def test_too_long_as_an_error(streaming: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [row(1), row(2, "long " * 100)])
    with pytest.raises(DataError, match=r"on_too_long is error(.|\n)*row 2"):
        run(train=path, max_length=60, on_too_long="error", streaming=streaming)


def test_nothing_usable_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [row(1, ""), row(2, "")])
    with pytest.raises(
        DataError, match=r"without a single usable row(.|\n)*2 rows \(row 1, row 2\) of 2.*empty answer"
    ):
        run(train=path)
    with pytest.raises(DataError, match=r"data\.train: no dataset"):
        run()
    with pytest.raises(DataError, match="has no rows"):
        run(train=write(tmp_path / "empty.jsonl", []))


def test_every_unsuitable_dataset_is_named_before_anything_is_tokenized(tmp_path: Path) -> None:
    text = write(tmp_path / "text.jsonl", [{"text": "a"}])
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError) as caught:
        prepare(
            DataConfig(train=[text, write(tmp_path / "x.jsonl", [row(1)])], eval=[pairs, str(tmp_path / "no.jsonl")]),
            tokenizer=TOKENIZER,
            record=Conversation,
            seed=0,
        )
    message = str(caught.value)
    assert "train.0: " in message
    assert "(format text) gives Text records, the objective learns from Conversation" in message
    assert "such data is for pretrain" in message
    assert "eval.0: " in message
    assert "gives Preference records" in message
    assert "eval.1: there is no file or folder" in message
    assert "train.1" not in message


def test_validation_split_follows_the_seed_and_leaves_no_leak(tmp_path: Path) -> None:
    twice = [row(number) for number in [*range(30), *range(30)]]  # every row is there twice
    path = write(tmp_path / "x.jsonl", twice)
    first = run(train=path, validation_split=0.2)
    assert len(first.eval) == 12
    assert not set(texts_of(first.eval)) & set(epoch(first))
    assert len(epoch(first)) == 48
    assert texts_of(run(train=path, validation_split=0.2).eval) == texts_of(first.eval)
    assert texts_of(run(seed=1, train=path, validation_split=0.2).eval) != texts_of(first.eval)
    assert (first.report.train_samples, first.report.eval_samples) == (48, 12)
    assert first.report.datasets[0].duplicates is not None
    assert first.report.datasets[0].duplicates.count == 30
    with pytest.raises(DataError, match="none would be left"):
        run(train=write(tmp_path / "one.jsonl", [row(1)]), validation_split=0.5)


@pytest.mark.parametrize("streaming", [False, True])
def test_leaks_between_files_are_told(streaming: bool, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", map(row, range(10)))
    held_out = write(tmp_path / "eval.jsonl", [{"messages": [
        {"role": "user", "content": "Say 7"}, {"role": "assistant", "content": "7 it is"}]}])  # fmt: skip
    prepared = run(train=train, eval=held_out, streaming=streaming)
    leaked = prepared.report.datasets[0].leaked
    assert leaked is not None
    assert (leaked.count, leaked.rows) == (1, ("row 8",))
    assert any("also in the held-out data" in notice for notice in prepared.report.notices)
    assert len(prepared.eval) == 1


def test_concat_and_interleave(tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", map(row, range(100, 140)))
    many = write(tmp_path / "many.jsonl", map(row, range(200, 500)))
    both = run(train=[few, many], shuffle=False)
    assert [text.count("Say 1") for text in epoch(both)] == [1] * 40 + [0] * 300

    mixed = run(train=[{"path": few, "weight": 1}, {"path": many, "weight": 3}], mix="interleave", shuffle=False)
    texts = epoch(mixed)
    from_few = sum("Say 1" in text for text in texts)
    assert from_few == 40
    assert 80 < len(texts) - 40 < 170  # three times as many, drawn by chance
    assert "Say 1" in texts[-1]  # it ends with the dataset that is used up
    order = [text for text in texts if "Say 1" not in text]
    assert order == sorted(order)
    assert mixed.report.datasets[1].not_drawn == 300 - (len(texts) - 40)
    assert mixed.report.train_samples == len(texts)
    assert any("not drawn" in notice for notice in mixed.report.notices)


def test_interleaving_beyond_the_first_that_is_used_up(tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", map(row, range(100, 110)))
    many = write(tmp_path / "many.jsonl", map(row, range(200, 290)))
    sources = [{"path": few, "weight": 1}, {"path": many, "weight": 1}]
    once = epoch(run(train=sources, mix="interleave_once", shuffle=False))
    assert sorted(once) == sorted(epoch(run(train=[few, many], shuffle=False)))
    assert once != epoch(run(train=[few, many], shuffle=False)), "drawn, not one after another"
    over = epoch(run(train=sources, mix="interleave_over", shuffle=False))
    assert set(over) == set(once)
    again = [text for text in over if "Say 1" in text]
    assert 60 < len(again) < 130, "about as often as the larger one, from the beginning again and again"
    assert again[:20] == again[:10] * 2
    assert [text for text in over if "Say 2" in text] == sorted(text for text in once if "Say 2" in text)


def test_a_number_of_rows_is_held_out(tmp_path: Path) -> None:
    prepared = run(train=write(tmp_path / "x.jsonl", map(row, range(30))), validation_split=7)
    assert (prepared.report.train_samples, prepared.report.eval_samples) == (23, 7)


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train[:3]", [0, 1, 2]),
        ("train[17:]", [17, 18, 19]),
        ("train[-2:]", [18, 19]),
        ("train[10%:20%]", [2, 3]),
        ("train[2:4]", [2, 3]),
    ],
)
def test_a_part_of_a_file(split: str, numbers: list[int], tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", map(row, range(20)))
    prepared = run(train=[{"path": path, "split": split}], shuffle=False)
    assert epoch(prepared) == [
        text
        for text in epoch(run(train=path, shuffle=False))
        if any(f"Say {number}\n" in text or f"Say {number}<" in text for number in numbers)
    ]
    assert len(epoch(prepared)) == len(numbers)


@pytest.mark.parametrize("split", ["train[3]", "train[:x]", "train[50:60]"])
def test_a_part_that_is_none(split: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", map(row, range(20)))
    with pytest.raises(DataError, match=r"split|it has no rows"):
        run(train=[{"path": path, "split": split}])


def test_preferences_become_numbered_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": f"Q{n}", "chosen": "yes", "rejected": "no"} for n in range(6)])
    prepared = run(record=Preference, train=path, eval=path, batch_size=3)
    assert [(segment.pair, segment.role) for segment in prepared.eval] == [
        (pair, role) for pair in range(6) for role in (CHOSEN, REJECTED)
    ]
    assert [segment.pair for segment in prepared.train.next_step()] == [0, 0, 1, 1, 2, 2]
    assert len(prepared.report.shown) == 4


def test_stream_gives_what_memory_gives(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.jsonl", map(row, range(50))), write(tmp_path / "b.jsonl", map(row, range(50, 90)))]
    for mix in ("concat", "interleave"):
        memory = run(train=paths, mix=mix, shuffle=False, batch_size=10)
        stream = run(train=paths, mix=mix, shuffle=False, batch_size=10, streaming=True)
        assert isinstance(stream.train, StreamingDataLoader)
        texts = epoch(memory)
        streamed: list[str] = []
        while stream.train.epoch < 1:
            streamed += texts_of(stream.train.next_step())
        assert streamed == texts


def test_stream_tells_its_losses_once_and_splits_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [*map(row, range(1500)), row(7, "")])  # beyond the rows looked at first
    reported: list[str] = []
    config = DataConfig(train=path, streaming=True, batch_size=500)
    prepared = prepare(config, tokenizer=TOKENIZER, record=Conversation, seed=0, on_notice=reported.append)
    assert not prepared.report.losses
    assert not prepared.report.complete
    for _ in range(7):  # two epochs and a part
        prepared.train.next_step()
    assert [notice for notice in reported if "empty answer" in notice] == reported
    assert len(reported) == 1
    with pytest.raises(DataError, match=r"data\.validation_split: a stream"):
        run(train=path, streaming=True, validation_split=0.1)
    with pytest.raises(DataError, match="strict: this data would be lost"):
        run(train=path, streaming=True, strict=True)  # the feed fills its first window


def test_progress_ends_with_the_number_of_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", map(row, range(2100)))
    seen: list[tuple[int, int | None]] = []
    prepare(
        DataConfig(train=path),
        tokenizer=TOKENIZER,
        record=Conversation,
        seed=0,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1000, None), (2000, None), (2100, 2100)]


def test_half_characters_do_not_break_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        json.dumps(row(1)) + "\n" + r'{"instruction": "x", "output": "\ud83d"}' + "\n"
        + r'{"instruction": "\\ud83d", "output": "\ud83d\ude00"}' + "\n"
    )  # fmt: skip
    prepared = run(train=str(tmp_path / "x.jsonl"))
    (dropped,) = prepared.report.datasets[0].dropped
    assert (dropped.what, dropped.rows) == ("broken text", ("row 2",))
    assert prepared.report.datasets[0].used == 2


def test_relative_paths_begin_at_source_root(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", [row(1)])
    prepared = prepare(
        DataConfig(train="x.jsonl"), tokenizer=TOKENIZER, record=Conversation, seed=0, source_root=tmp_path
    )
    assert prepared.train.num_samples == 1


def test_the_packaged_dataset(tmp_path: Path) -> None:
    prepared = run(train="lowrank/demo", eval="lowrank/demo-heldout", strict=True)
    assert prepared.report.datasets[0].leaked is None
    assert prepared.eval


@pytest.mark.parametrize(
    ("file", "record", "rows"),
    [
        ("alpaca_en_demo.json", Conversation, 999),
        ("alpaca_zh_demo.json", Conversation, 1000),
        ("glaive_toolcall_en_demo.json", Conversation, 300),
        ("glaive_toolcall_zh_demo.json", Conversation, 300),
        ("dpo_en_demo.json", Preference, 300),
        ("kto_en_demo.json", Rated, 300),
        ("wiki_demo.txt", Text, 30),
    ],
)
def test_real_datasets_lose_nothing(file: str, record: type, rows: int, shared_data: Path) -> None:
    tokenizer = tokenizer_of("qwen3", trl_template("qwen3"))
    config = DataConfig(train=str(shared_data / file), max_length=200_000)
    report = prepare(config, tokenizer=tokenizer, record=record, seed=0).report
    assert report.losses == []
    assert report.datasets[0].used == rows
    assert 0.05 < report.learned_share <= 1


def test_real_answers_that_a_template_would_cut_are_counted(shared_data: Path) -> None:
    """Two answers of this file hold a second `</think>`; Qwen3's template shows them without what stands between."""
    tokenizer = tokenizer_of("qwen3", trl_template("qwen3"))
    config = DataConfig(train=str(shared_data / "reason_tool_use_demo_50.jsonl"), max_length=200_000)
    (dataset,) = prepare(config, tokenizer=tokenizer, record=Conversation, seed=0).report.datasets
    assert (dataset.read, dataset.used) == (50, 48)
    assert sorted(place for finding in dataset.dropped for place in finding.rows) == ["row 6", "row 7"]
    assert all("leaves out part of the answer" in finding.what for finding in dataset.dropped)


def test_real_placeholders_are_told_and_filled(shared_data: Path) -> None:
    path = str(shared_data / "identity.json")
    bare = run(train=path)
    assert any("placeholder {{name}}" in notice for notice in bare.report.notices)
    filled = run(train={"path": path, "replace": {"{{name}}": "Ada", "{{author}}": "Bob"}})
    assert not any("placeholder" in notice for notice in filled.report.notices)
    assert not any("{{" in text for text in epoch(filled))


def test_real_images_are_refused_with_the_reason(shared_data: Path) -> None:
    with pytest.raises(DataError, match=r"6 rows .* of 6 left out: it has images; the first: .*text only"):
        run(train=str(shared_data / "mllm_demo.json"))


def test_what_was_asked_for_is_information_and_no_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [*map(row, range(20)), row(3), row(90, "")])
    report = run(train={"path": path, "max_samples": 22}, validation_split=0.1).report
    assert report.warnings == tuple(report.losses)
    assert len(report.losses) == 1
    assert any("repeated" in text for text in report.information)
    assert report.notices == (*report.warnings, *report.information)
    (chosen,) = run(train={"path": path, "max_samples": 15}).report.information[:1]
    assert "15 of 22 rows are taken, chosen by seed 0" in chosen
