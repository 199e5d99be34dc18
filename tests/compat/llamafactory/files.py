"""A workplace laid out as LLaMA-Factory's repository, and its files read by `compat`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowrank.compat import load_any
from lowrank.config import RunConfig
from lowrank.errors import ConfigError

INFO: dict[str, Any] = {
    "identity": {"file_name": "identity.json"},
    "alpaca_en_demo": {"file_name": "alpaca_en_demo.json"},
    "c4_demo": {"file_name": "c4_demo.jsonl", "columns": {"prompt": "text"}},
    "pairs": {"file_name": "identity.json", "ranking": True},
    "chats": {
        "file_name": "identity.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "rated": {
        "file_name": "identity.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "label"},
    },
    "pictures": {"file_name": "identity.json", "formatting": "sharegpt", "columns": {"messages": "m", "images": "i"}},
    "films": {"file_name": "identity.json", "formatting": "sharegpt", "columns": {"messages": "m", "videos": "v"}},
}


WITHOUT_CODE = "model.trust_remote_code has no effect without --allow-code: the model's own code stays off"
"""Their examples all set it; a file is no permission."""
MINIMAL = "model_name_or_path: m/x\ndo_train: true\ndataset: identity\noutput_dir: out\n"


def read(workplace: Path, text: str, *arguments: str) -> tuple[RunConfig, list[str]]:
    path = workplace / "examples" / "train_lora" / "run.yaml"
    path.write_text(text)
    return load_any(path, arguments)


def problems(workplace: Path, text: str, *arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(workplace, text, *arguments)
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]]


def settings(config: RunConfig) -> dict[str, Any]:
    content = config.model_dump(mode="json", exclude={"jobs"})
    assert [job.model_dump(mode="json", exclude={"name"}) for job in config.jobs] == [
        {key: content[key] for key in type(config.jobs[0]).model_fields if key != "name"}
    ]
    return content
