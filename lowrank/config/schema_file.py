"""schema.json beside this file, a run as JSON schema; `python -m lowrank.config.schema_file` writes it."""

from __future__ import annotations

import json
from pathlib import Path

from lowrank.config.schema import RunConfig

FILE = Path(__file__).with_name("schema.json")


def schema_text() -> str:
    """What stands in schema.json."""
    return json.dumps(RunConfig.model_json_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(schema_text(), encoding="utf-8")
