"""LLaMA-Factory's `dataset_info.json`: names of datasets -> sources as the data room knows them.

An entry says where the rows are (`file_name`, `hf_hub_url`, ...), their `formatting`, which `columns`
play which part and what the `tags` of a conversation are called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub

from lowrank.data.config import SourceConfig
from lowrank.data.formats.columns import COLUMNS, TAGS, describe
from lowrank.data.sources.places import WHOLE
from lowrank.errors import ConfigError, ModelError, did_you_mean, near, raise_all
from lowrank.models import modelscope_hub

FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
"""`formatting` -> `format`."""

PLACES = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name")
KNOWN = (
    *PLACES,
    *("formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags", "revision"),
)
WITHOUT_MEANING = ("file_sha1",)
"""Keys of older versions of LLaMA-Factory, which it does not read itself any more."""
ELSEWHERE = {
    "om_hub_url": "a Modelers dataset",
    "script_url": "a dataset script",
    "cloud_file_name": "a file in cloud storage",
}
"""Places that are not read, in words."""

TEXT_COLUMNS: dict[str, dict[str, str]] = {
    "alpaca": {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": "",
        "system": "",
        "tools": "",
    },
    "sharegpt": {"messages": "conversations", "system": "", "tools": ""},
    "openai": {"messages": "conversations", "system": "", "tools": ""},
}
"""Columns that mean something in each formatting, with LLaMA-Factory's defaults; "" is none. Others are set aside."""

RECORDS = {"sft": "conversation", "pt": "text", "dpo": "pair", "rm": "pair", "kto": "rated", "ppo": "conversation"}
"""What a row has to be for each stage."""

MEDIA = ("images", "videos", "audios")
"""Columns of what models are shown and played."""


def places_of(name: str, folder: Path) -> list[Path]:
    """Where a file or folder is looked for that a file in `folder` names: from the current directory, as LLaMA-Factory
    means it; then from `folder` and the folders above it (its examples lie two folders below `data`)."""
    bases = (Path(), folder, *folder.resolve().parents[:3])
    return list(dict.fromkeys(base / Path(name).expanduser() for base in bases))


def find_info(dataset_dir: str, folder: Path) -> tuple[Path | None, list[Path]]:
    """The folder that holds `dataset_info.json`, and everywhere it was looked for."""
    places = places_of(dataset_dir, folder)
    for place in places:
        if (place / "dataset_info.json").is_file():
            return place, places
    return None, places


def remote_info(name: str) -> tuple[Path | None, str]:
    """The folder of a hub dataset with a `dataset_info.json` and the files it names, downloaded or in the cache; else
    why there is none."""
    try:
        folder = Path(huggingface_hub.snapshot_download(name, repo_type="dataset"))
    except Exception as error:  # whatever the network or the hub brings
        return None, f"{name} cannot be downloaded from the hub ({' '.join(str(error).split())[:200]})"
    if not (folder / "dataset_info.json").is_file():
        return None, f"{name} on the hub has no dataset_info.json"
    return folder, ""


def read_info(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The content of `dataset_info.json` in `folder`, and a complaint if it cannot be read."""
    path = folder / "dataset_info.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        return {}, f"{path} cannot be read: {error}"
    except json.JSONDecodeError as error:
        return {}, f"{path}, line {error.lineno}, column {error.colno}: {error.msg}"
    except RecursionError:
        return {}, f"{path}: nested too deep"
    if not isinstance(content, dict):
        return {}, f"{path}: expected {{name: entry}}"
    return content, None


def sources(
    names: Sequence[str], info: Mapping[str, Any], folder: Path, stage: str, media_dir: Path | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """One source per dataset name, and what stands in the way. `media_dir`: of their media; None: `folder`."""
    found: list[dict[str, Any]] = []
    problems: list[str] = []
    for name in names:
        entry = info.get(name)
        if not isinstance(entry, Mapping):
            problem = "is not an entry" + did_you_mean(name, info) if entry is None else "is not a group of settings"
            problems.append(f"dataset {name!r}: {problem} (in {folder / 'dataset_info.json'})")
            continue
        complaints = _complaints(entry, stage)
        problems.extend(f"dataset {name!r}: {complaint}" for complaint in complaints)
        if not complaints:
            source = _source(entry, folder, stage)
            if any((entry.get("columns") or {}).get(column) for column in MEDIA):
                source["media_dir"] = str(media_dir or folder)
            found.append(source)
    return found, problems


def named_sources(
    names: Sequence[str], folder: Path, max_samples: int | None = None, media_dir: str | None = None
) -> tuple[SourceConfig, ...]:
    """Datasets of the `dataset_info.json` in `folder`, as conversations with an answer; `max_samples` of each.
    `media_dir`: of their media; None: `folder`.

    Raises ConfigError with everything that stands in the way.
    """
    info, complaint = read_info(folder)
    media = None if media_dir is None else Path(media_dir)
    found, problems = sources(names, info, folder, "sft", media) if complaint is None else ([], [complaint])
    raise_all(ConfigError, f"{folder}:", problems)
    if max_samples is not None:
        found = [{**each, "max_samples": min(each.get("max_samples", max_samples), max_samples)} for each in found]
    return tuple(SourceConfig.model_validate(each) for each in found)


def _wrong_types(entry: Mapping[str, Any]) -> list[str]:
    wanted: dict[str, type] = dict.fromkeys(
        ("file_name", "hf_hub_url", "ms_hub_url", "split", "subset", "formatting"), str
    )
    wanted |= {"columns": dict, "tags": dict, "num_samples": int}
    type_names = {str: "text", dict: "an object", int: "a number"}
    return [
        f"{key}: expected {type_names[kind]}, got {describe(entry[key])}"
        for key, kind in wanted.items()
        if entry.get(key) is not None and not isinstance(entry[key], kind)
    ] + [
        f"{key}.{part}: expected the name of a column, got {describe(name)}"
        for key in ("columns", "tags")
        if isinstance(entry.get(key), dict)
        for part, name in entry[key].items()
        if name is not None and not isinstance(name, str)
    ]


def _complaints(entry: Mapping[str, Any], stage: str) -> list[str]:
    wrong = _wrong_types(entry)
    if wrong:
        return wrong
    columns, formatting = entry.get("columns") or {}, entry.get("formatting", "alpaca")
    slips = {key: near(key, set(KNOWN) - set(entry)) for key in _unread(entry) if key not in WITHOUT_MEANING}
    complaints = [f"unknown key {key!r}; did you mean {meant!r}?" for key, meant in slips.items() if meant]
    if formatting not in FORMATS:
        complaints.append(f"formatting {formatting!r} is not known{did_you_mean(str(formatting), FORMATS)}")
    taken = [column for column in MEDIA if columns.get(column)]
    if taken and stage in ("pt", "ppo"):
        complaints.append(f"it has {', '.join(taken)}, and stage {stage} is on text alone so far; leave it out")
    pairs = RECORDS.get(stage) == "pair"
    if entry.get("ranking") and not pairs:
        complaints.append(f"it holds preference pairs (ranking: true), which stage {stage} cannot use")
    if not entry.get("ranking") and pairs:
        complaints.append(f"stage {stage} needs preference pairs, and it is not marked ranking: true")
    if RECORDS.get(stage) == "rated" and not columns.get("kto_tag"):
        complaints.append("stage kto needs rated answers, and columns.kto_tag is not given")
    elsewhere = [key for key in ELSEWHERE if entry.get(key)]
    if entry.get("ms_hub_url") and _of_modelscope(entry):
        elsewhere = []
        try:
            modelscope_hub.folder_of(entry["ms_hub_url"], dataset=True)
        except ModelError as error:
            complaints.append(str(error))
    elif not entry.get("hf_hub_url") and not entry.get("file_name"):
        place = ELSEWHERE[elsewhere[0]] if elsewhere else "nowhere"
        complaints.append(f"its rows are {place}; give file_name or hf_hub_url")
    if entry.get("hf_hub_url") and entry.get("folder"):
        complaints.append("`folder` of a hub dataset is not read; download the folder and give file_name")
    if entry.get("revision"):
        complaints.append("`revision` of a hub dataset is not read; download that revision and give file_name")
    if stage == "pt" and (formatting != "alpaca" or not columns.get("prompt") or columns.get("query")):
        complaints.append("for stage pt, name the one column of text: formatting alpaca, columns {prompt: NAME}")
    return complaints


def _of_modelscope(entry: Mapping[str, Any]) -> bool:
    """Whether its rows come from ModelScope's hub: where that is asked for, or no other place is named."""
    named = isinstance(entry.get("ms_hub_url"), str)
    return named and (modelscope_hub.is_wanted() or not (entry.get("hf_hub_url") or entry.get("file_name")))


def _unread(entry: Mapping[str, Any]) -> list[str]:
    """Keys that mean nothing here and may mean something elsewhere: the doctor names them."""
    columns, tags = entry.get("columns"), entry.get("tags")
    inner = [f"columns.{part}" for part in columns if part not in COLUMNS] if isinstance(columns, Mapping) else []
    inner += [f"tags.{tag}" for tag in tags if tag not in TAGS] if isinstance(tags, Mapping) else []
    if not entry.get("hf_hub_url"):
        inner += [key for key in ("subset", "folder") if entry.get(key)]
        inner += ["split"] if entry.get("split", "train").partition("[")[0] != "train" else []
    return [*(str(key) for key in entry if key not in KNOWN), *inner]


def _source(entry: Mapping[str, Any], folder: Path, stage: str) -> dict[str, Any]:
    formatting = entry.get("formatting", "alpaca")
    by_record = {"text": "text", "pair": "preference", "rated": "rated"}
    source: dict[str, Any] = {"format": by_record.get(RECORDS[stage]) or FORMATS[formatting]}
    if _of_modelscope(entry):
        source["path"] = modelscope_hub.folder_of(entry["ms_hub_url"], dataset=True)
        source.update({key: entry[key] for key in ("split", "subset") if entry.get(key)})
    elif entry.get("hf_hub_url"):
        source["path"] = entry["hf_hub_url"]
        source.update({key: entry[key] for key in ("split", "subset") if entry.get(key)})
    else:
        source["path"] = str(folder / entry["file_name"])
        if Path(source["path"]).is_dir():
            source["split"] = WHOLE  # there, a folder is read whole, whatever its files are called
        name, bracket, part = str(entry.get("split", "")).partition("[")
        if bracket and name == "train":  # there, all that is local is one split of that name
            source["split"] = f"{source.get('split', name)}[{part}"
    source["unread_keys"] = _unread(entry)
    source["columns"] = _columns(entry.get("columns") or {}, formatting, stage)
    if formatting != "alpaca" and entry.get("tags"):
        source["tags"] = dict(entry["tags"])
    if entry.get("num_samples"):
        source["max_samples"] = entry["num_samples"]
    return {key: value for key, value in source.items() if value not in ({}, [])}


def _columns(columns: Mapping[str, str], formatting: str, stage: str) -> dict[str, str]:
    """Which column plays which part. As in LLaMA-Factory, a part that is not mapped is played by its default column
    only where nothing is mapped, and by no column otherwise (written "", so that none is guessed)."""
    if stage == "pt":
        return {"text": columns["prompt"]}
    defaults = TEXT_COLUMNS[formatting]
    if not columns:
        mapped = {part: "" for part, default in defaults.items() if not default}
    else:
        mapped = {part: columns.get(part) or "" for part in defaults}
    shown = {column: columns[column] for column in MEDIA if columns.get(column)}
    return mapped | shown | _of_answers(columns, formatting, stage)


def _of_answers(columns: Mapping[str, str], formatting: str, stage: str) -> dict[str, str]:
    """The parts of pairs and ratings. A prompt is played by the columns of its formatting, never by another's."""
    if RECORDS[stage] not in ("pair", "rated"):
        return {}
    other = {"messages": ""} if formatting == "alpaca" else {"prompt": ""}
    if RECORDS[stage] == "rated":
        return other | {"kto_tag": columns["kto_tag"]}
    return other | {part: columns.get(part) or part for part in ("chosen", "rejected")}
