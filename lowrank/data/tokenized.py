"""Tokenized data kept on disk, as LLaMA-Factory's `tokenized_path` keeps it: written once, read by later runs.

A folder that `datasets` writes (`DatasetDict.save_to_disk`), with the splits `train` and `validation`:

    sft, pretrain   input_ids, attention_mask, labels (-100: context; no labels: every token is learned)
    pairs           chosen_input_ids, chosen_attention_mask, chosen_labels, and the same of rejected_
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.data.batching.dataloader import Sample
from lowrank.data.chat.rendered_record import Rendering
from lowrank.data.config import SourceConfig
from lowrank.data.report.row_counts import RowCounts
from lowrank.data.sources.rows import read_rows
from lowrank.errors import DataError
from lowrank.records import Preference, Rated
from lowrank.segments import CHOSEN, REJECTED, Segment

CONTEXT = -100
"""The label of a token that is not learned."""
VALIDATION = "validation"
_SIDES = {"chosen_": CHOSEN, "rejected_": REJECTED}
_FORMAT = "tokenized"


def is_written(path: str | None) -> bool:
    """Whether there is tokenized data at `path`."""
    return path is not None and (Path(path).expanduser() / "dataset_dict.json").is_file()


def read_tokenized(
    path: str, record: type, max_length: int, vocabulary: int
) -> tuple[list[Sample], list[Sample], list[RowCounts]]:
    """Training samples, held-out samples, and the counts of each split. Raises DataError for what is none, was made for
    another objective, or by a tokenizer of more tokens."""
    folder = Path(path).expanduser()
    splits = [name for name in ("train", VALIDATION) if (folder / name).is_dir()]
    read: dict[str, list[Sample]] = {"train": [], VALIDATION: []}
    all_row_counts = []
    for split in splits:
        row_counts = RowCounts(
            path, path, "train" if split == "train" else "eval", _FORMAT, record, learn_digests=False
        )
        for row in read_rows(SourceConfig(path=path, split=split), seed=0):
            place = row_counts.read(row)
            sample = tuple(_segments(row.values, f"{path}, {split}, {place}", record, max_length, vocabulary))
            row_counts.take(place, Rendering(sample))
            read[split].append(sample)
        all_row_counts.append(row_counts)
    if not read["train"]:
        raise DataError(f"{path} holds no tokenized training rows")
    return read["train"], read[VALIDATION], all_row_counts


def write_tokenized(path: str, train: Iterable[Sample], held_out: Sequence[Segment]) -> None:
    """Keep samples at `path`. Raises DataError for weights that labels cannot say, and for ratings."""
    import datasets  # takes as long to import as torch

    splits = {"train": datasets.Dataset.from_list(list(map(_row, train)))}
    pairs: list[Sample] = []
    for segment in held_out:
        if segment.pair >= 0 and pairs and pairs[-1][0].pair == segment.pair:
            pairs[-1] = (*pairs[-1], segment)
        else:
            pairs.append((segment,))
    if pairs:
        splits[VALIDATION] = datasets.Dataset.from_list(list(map(_row, pairs)))
    try:
        kept = datasets.DatasetDict(splits)  # pyright: ignore[reportCallIssue, reportArgumentType] (a dict's subclass)
        kept.save_to_disk(str(Path(path).expanduser()))
    except OSError as error:
        raise DataError(f"data.tokenized_path: {path} cannot be written: {error.strerror or error}") from error


def check_record(record: type) -> None:
    """DataError for records whose samples are not kept."""
    if record is Rated:
        raise DataError("data.tokenized_path: rated answers are not kept tokenized; leave it out")


def _row(sample: Sample) -> dict[str, Any]:
    if len(sample) == 1:
        return _columns(sample[0], "")
    by_role = {segment.role: segment for segment in sample}
    return {name: value for side, role in _SIDES.items() for name, value in _columns(by_role[role], side).items()}


def _columns(segment: Segment, side: str) -> dict[str, Any]:
    if not np.isin(segment.weight_L, (0.0, 1.0)).all():
        raise DataError("data.tokenized_path: turns with weights other than 0 and 1 cannot be kept as labels")
    labels = np.where(segment.weight_L > 0, segment.token_L, CONTEXT)
    ones = [1] * len(segment)
    return {
        f"{side}input_ids": segment.token_L.tolist(), f"{side}attention_mask": ones, f"{side}labels": labels.tolist(),
    }  # fmt: skip


def _segments(row: Mapping[str, Any], place: str, record: type, max_length: int, vocabulary: int) -> Iterator[Segment]:
    sides = _SIDES if record is Preference else {"": 0}
    missing = [f"{side}input_ids" for side in sides if f"{side}input_ids" not in row]
    if missing:
        raise DataError(f"{place}: has no {missing[0]}, so it was tokenized for another objective; choose another path")
    for side, role in sides.items():
        token_L = np.asarray(row[f"{side}input_ids"], np.int64)
        label_L = np.asarray(row.get(f"{side}labels") or token_L, np.int64)
        if len(label_L) != len(token_L) or not len(token_L):
            raise DataError(f"{place}: {side}input_ids and {side}labels have {len(token_L)} and {len(label_L)} numbers")
        if token_L.min() < 0 or token_L.max() >= vocabulary:
            raise DataError(f"{place}: token {token_L.max()}, and the tokenizer has {vocabulary}; tokenize it anew")
        if len(token_L) > max_length:
            raise DataError(f"{place}: {len(token_L)} tokens, more than data.max_length {max_length}; tokenize it anew")
        weight_L = (label_L != CONTEXT).astype(np.float32)
        weight_L[0] = 0.0
        yield Segment(token_L, weight_L, pair=0 if role else -1, role=role)
