"""Which files of a folder are its data: by what the folder says of itself, then by the names of its files.

In this order: what `datasets` wrote down (dataset_dict.json, state.json), the card of the dataset (`configs` at the
head of README.md), a folder or files named like the subset, and names like those that `datasets` understands: a split
of any name in `NAME-00000-of-00001.parquet`, the words train, test and validation elsewhere.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lowrank.data.sources.dataset_card import DatasetSubset, choices_of
from lowrank.data.sources.encodings import Note
from lowrank.data.sources.places import WHOLE, shown
from lowrank.data.sources.readers import is_data
from lowrank.errors import DataError, near

_MOST_FILES = 100_000
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that `datasets` and LLaMA-Factory put beside data."""
_LEFTOVER = re.compile(r"(cache|tmp)-[0-9a-f]+(_\d+_of_\d+)?\.arrow|tmp\w{8}")
"""What `datasets` leaves beside data when a `map` or `filter` is tried."""
_SHARD = re.compile(r"(?P<split>\w+(?:[.-]\w+)*?)-\d{5}-of-\d{5}")
_NO_SPLITS = ("data", "dataset", "part", "shard", "rows", "file")
_OF_PARTS = frozenset({*_NO_SPLITS, "of", "chunk", "split", "batch", "a", "b", "c", "d"})
"""What names of the parts of one thing have in common, beside numbers."""
_SPLIT_NAMES = {
    "train": re.compile(r"(^|[/_.-])(train|training)(?=[/_. 0-9-]|$)"),
    "test": re.compile(r"(^|[/_.-])(test|testing|eval|evaluation|heldout|held-out)(?=[/_. 0-9-]|$)"),
    "validation": re.compile(r"(^|[/_.-])(valid|validation|val|dev)(?=[/_. 0-9-]|$)"),
}


_HELD_OUT = ("test", "validation")


@dataclass(frozen=True)
class _Wanted:
    folder: Path
    split: str
    subset: str | None
    note: Note


def files_of(folder: Path, split: str, subset: str | None, note: Note) -> list[Path]:
    """The data files of `split` (`all`: of every split) in a folder and those below it, in the order of their names.

    What is left out is noted. Raises DataError if there is none, if the subset is not there, or if several splits
    could be meant: it lists those there are.
    """
    wanted = _Wanted(folder, split, subset, note)
    if (folder / "dataset_dict.json").is_file():
        return _of_saved_dict(wanted)
    if (folder / "state.json").is_file():
        _refuse_subset(wanted, ())
        return _of_state(folder)
    choices = choices_of(folder)
    if choices:
        return _of_card(wanted, choices)
    if subset is not None:
        wanted = _Wanted(_folder_of_subset(wanted), split, None, note)
    return _of_names(wanted, _data_below(wanted.folder))


def _of_saved_dict(wanted: _Wanted) -> list[Path]:
    _refuse_subset(wanted, ())
    content = _json(wanted.folder / "dataset_dict.json")
    splits = [name for name in content.get("splits") or [] if isinstance(name, str)]
    if wanted.split == WHOLE:
        return [file for name in splits for file in _of_state(_inside(wanted.folder, name))]
    if wanted.split not in splits:
        raise _no_split(wanted, splits)
    return _of_state(_inside(wanted.folder, wanted.split))


def _of_state(folder: Path) -> list[Path]:
    """The files that a folder written by `save_to_disk` names as its data; others in it are leftovers."""
    entries = _json(folder / "state.json").get("_data_files")
    names = [entry.get("filename") for entry in entries or [] if isinstance(entry, dict)]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(
            f"{shown(folder / 'state.json')}: names no data files (_data_files); was the folder saved whole?"
        )
    files = [_inside(folder, str(name)) for name in names]
    gone = [file.name for file in files if not file.is_file()]
    if gone:
        raise DataError(f"{shown(folder)}: state.json names {', '.join(map(shown, gone[:5]))}, which is not there")
    return files


def _of_card(wanted: _Wanted, choices: Sequence[DatasetSubset]) -> list[Path]:
    """The files that the card names for the subset and the split."""
    names = [choice.name for choice in choices]
    default = next((choice for choice in choices if choice.default), choices[0] if len(choices) == 1 else None)
    chosen = next((choice for choice in choices if choice.name == wanted.subset), None)
    chosen = default if wanted.subset is None else chosen
    if chosen is None and wanted.subset is None:
        raise DataError(f"{shown(wanted.folder)}: its card has the subsets {', '.join(names)}; set `subset` to one")
    if chosen is None:
        raise _no_subset(wanted, names)
    every = _data_below(wanted.folder)
    if chosen.folder:
        every = [file for file in every if _inside(wanted.folder, chosen.folder) in file.parents]
    if not chosen.patterns:
        return _of_names(wanted, every)
    found = {split: _matching(wanted.folder, every, patterns) for split, patterns in chosen.patterns.items()}
    split = _choose(wanted, found)
    kept = [file for files in found.values() for file in files] if split == WHOLE else found[split or ""]
    if not kept:
        raise DataError(f"{shown(wanted.folder)}: its card names no file of the split {wanted.split!r} that is there")
    _note_left(wanted, every, kept)
    return kept


def _of_names(wanted: _Wanted, every: Sequence[Path]) -> list[Path]:
    """The files whose names say that they belong to the split, and those that say nothing where train is wanted."""
    splits: dict[Path, str | None] = {file: split_of(file.relative_to(wanted.folder)) for file in every}
    named = {split: [file for file in every if splits[file] == split] for split in splits.values() if split is not None}
    if not every:
        there = ", ".join(shown(name) for name in sorted(os.listdir(wanted.folder))[:10]) or "no file at all"
        raise DataError(f"{shown(wanted.folder)}: no data file in this folder, which has {there}")
    if not named or wanted.split == WHOLE:
        if not named and wanted.split not in ("train", WHOLE):
            own = [file for file in every if _stem(file) == wanted.split]
            if not own:
                raise _no_split(wanted, sorted({_stem(file) for file in every}))
            _note_left(wanted, every, own)
            return own
        _note_left(wanted, every, every)
        return list(every)
    own = [file for file in every if _stem(file) == wanted.split]
    split = _choose(wanted, named) if not own or wanted.split in named else None
    kept = [file for file in every if splits[file] == split] if split else own
    if split:
        _refuse_several(wanted, split, kept)
    unnamed = [file for file in every if splits[file] is None]
    if wanted.split == "train" and unnamed:
        kept = [file for file in every if file in {*kept, *unnamed}]
        several = ", ".join(_relative(wanted.folder, unnamed)[:10])
        wanted.note(f"taken with the split train, since their names say of no split: {several}")
    _note_left(wanted, every, kept)
    return kept


def _choose(wanted: _Wanted, found: dict[str, list[Path]] | Iterable[str]) -> str | None:
    """The split that is meant: the one asked for, or the only one whose name begins like it. DataError lists them."""
    splits = sorted(found)
    if wanted.split == WHOLE or wanted.split in splits:
        return wanted.split
    like = [split for split in splits if split.startswith(wanted.split)]
    if len(like) == 1:
        wanted.note(f"the split {like[0]!r} is taken, the only one like {wanted.split!r}")
        return like[0]
    if (
        wanted.split == "train"
        and len(splits) == 1
        and not any(_SPLIT_NAMES[held_out].search(splits[0]) for held_out in _HELD_OUT)
    ):
        wanted.note(f"the split {splits[0]!r} is taken, the only one there is")
        return splits[0]
    raise _no_split(wanted, like or splits)


def _refuse_several(wanted: _Wanted, split: str, files: Sequence[Path]) -> None:
    """DataError for files of one folder that belong to one split by name and yet say that they are different things:
    `train_sft.jsonl` and `train_prefs.jsonl`. Numbers, and words as `part`, say only that there are several."""
    if split not in _SPLIT_NAMES:
        return
    own: dict[tuple[Path, str], Path] = {}
    for file in files:
        stem = _stem(file).lower()
        found = _SPLIT_NAMES[split].search(stem)
        if found and not _SHARD.fullmatch(stem):
            rest = stem[: found.start(2)] + stem[found.end(2) :]
            parts = tuple(part for part in re.split(r"[\W\d_]+", rest) if part and part not in _OF_PARTS)
            own.setdefault((file.parent, " ".join(parts)), file)
    for folder in dict.fromkeys(parent for parent, _ in own):
        several = [file for (parent, _), file in own.items() if parent == folder]
        if len(several) > 1:
            names = ", ".join(_relative(wanted.folder, several)[:10])
            raise DataError(
                f"{shown(wanted.folder)}: the split {split!r} could be any of {names}, which are different things by "
                f"their names; set `split` to one of {', '.join(shown(_stem(file)) for file in several[:10])}, name "
                "one file, or ask for `split: all`"
            )


def _no_split(wanted: _Wanted, splits: Sequence[str]) -> DataError:
    there = ", ".join(map(shown, splits[:20])) or "none with a name"
    several = "several could be meant" if any(split.startswith(wanted.split) for split in splits) else "there is none"
    return DataError(
        f"{shown(wanted.folder)}: split {wanted.split!r}: {several}; the splits are {there}; set `split` to one of "
        f"them, to {WHOLE!r} for every file, or name a file"
    )


def _no_subset(wanted: _Wanted, names: Sequence[str]) -> DataError:
    close = near(str(wanted.subset), names)
    there = ", ".join(map(shown, names[:20])) or "none in this folder"
    hint = f"; did you mean {close!r}?" if close else ""
    return DataError(f"{shown(wanted.folder)}: no subset {wanted.subset!r}; there are {there}{hint}")


def _refuse_subset(wanted: _Wanted, names: Sequence[str]) -> None:
    if wanted.subset is not None:
        raise _no_subset(wanted, names)


def _folder_of_subset(wanted: _Wanted) -> Path:
    """The folder of the subset: directly below, or below `data`."""
    assert wanted.subset is not None
    places = [place for place in (wanted.folder, wanted.folder / "data") if place.is_dir()]
    below = {entry.name: entry for place in places for entry in sorted(place.iterdir()) if entry.is_dir()}
    folder = below.get(wanted.subset)
    if folder is None:
        raise _no_subset(wanted, [name for name in below if not name.startswith(".")])
    return folder


def split_of(file: Path) -> str | None:
    """The split that a name speaks of, its folder's included; None if of none."""
    shard = _SHARD.fullmatch(_stem(file))
    if shard and shard["split"].lower() not in _NO_SPLITS:
        return shard["split"]
    name = file.with_name(_stem(file)).as_posix().lower()
    return next((split for split, pattern in _SPLIT_NAMES.items() if pattern.search(name)), None)


def _stem(file: Path) -> str:
    return file.name.split(".")[0] if not file.name.startswith(".") else file.name


def _data_below(folder: Path) -> list[Path]:
    """Every data file below, by name; no hidden ones, no descriptions, no leftovers, and of saved folders what
    they name."""
    found: list[Path] = []
    seen = 0
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        seen += len(names)
        if seen > _MOST_FILES:
            raise DataError(
                f"{shown(folder)}: more than {_MOST_FILES:,} files below it; name the folder of the data itself"
            )
        if "state.json" in names and Path(place) != folder:
            found += _of_state(Path(place))
            continue
        paths = (Path(place, name) for name in names if not name.startswith("."))
        found += [path for path in paths if is_data(path) and not _is_aside(path.name) and path.is_file()]
    return sorted(found)


def _is_aside(name: str) -> bool:
    return name in _DESCRIPTIONS or _LEFTOVER.fullmatch(name) is not None


def _note_left(wanted: _Wanted, every: Iterable[Path], kept: Iterable[Path]) -> None:
    """Note the files that are not read: of other splits, and of kinds that hold no rows."""
    taken = set(kept)
    others = [entry for entry in sorted(wanted.folder.iterdir()) if entry.is_file() and not entry.name.startswith(".")]
    left = sorted({file for file in (*every, *others) if file not in taken})
    if left:
        names = _relative(wanted.folder, left)
        wanted.note(f"left out in {wanted.folder.name}: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}")


def _relative(folder: Path, files: Iterable[Path]) -> list[str]:
    return [shown(file.relative_to(folder)) for file in files]


def _matching(folder: Path, every: Sequence[Path], patterns: Iterable[str]) -> list[Path]:
    """The files that the card's patterns name, in their order."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        if (folder / pattern) in every:
            found[folder / pattern] = None
            continue
        found.update(dict.fromkeys(file for file in every if _fits(file.relative_to(folder).as_posix(), pattern)))
    return list(found)


def _fits(name: str, pattern: str) -> bool:
    """Whether a name is meant: a folder stands for all in it, `*` for anything within a name, `**` across folders."""
    if "**" in pattern:
        return fnmatch(name, pattern.replace("**/", "*").replace("**", "*"))
    parts, wanted = name.split("/"), pattern.strip("/").removeprefix("./").split("/")
    return (
        len(parts) >= len(wanted)
        and all(map(fnmatch, parts, wanted))
        and (len(parts) == len(wanted) or "*" not in wanted[-1])
    )


def _inside(folder: Path, name: str) -> Path:
    """`folder / name`, which must not lead out of it."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise DataError(f"{shown(folder)}: it names {shown(name)}, which is outside of it")
    return path


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{shown(path)}: cannot be read as JSON ({str(error)[:100]}); was the folder saved whole?"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{shown(path)}: expected an object as `datasets` writes it")
    return content
