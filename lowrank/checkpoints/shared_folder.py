"""A run folder whose jobs are trained in shares, each of which is an ordinary run in a folder of its own.

    <output_dir>/shares/assignment.json    which share has which jobs: written by the first process, followed by all
    <output_dir>/shares/3-of-4/            a run folder
    <output_dir>/...                       what the shares have come to, merged (pipelines/merge_shares.py)

Shares may be of different machines that see one file system. Nothing is locked between them: `assignment.json` is there
whole or not at all, and each share locks its own folder.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lowrank.checkpoints.run_folder import SHARES
from lowrank.errors import OutputError
from lowrank.foreign_files import find_json

ASSIGNMENT = "assignment.json"
_OLD_ASSIGNMENT = "deal.json"
"""Its name in run folders that an earlier lowrank has begun."""


def read_assignment(output_dir: Path) -> tuple[int, dict[str, int]] | None:
    """Return how many shares there are, and the share of each job (1 is the first), in the order of the jobs; None
    where no job is assigned yet. OutputError for a file that lowrank did not write."""
    path = output_dir / SHARES / ASSIGNMENT
    found = find_json(path)
    if found is None:
        path = path.with_name(_OLD_ASSIGNMENT)
        found = find_json(path)
    if found is None:
        return None
    of, jobs = found.get("of"), found.get("jobs")
    if isinstance(of, int) and isinstance(jobs, dict) and all(each in range(1, of + 1) for each in jobs.values()):
        return of, dict(jobs)
    raise OutputError(f"{path} does not say which share has which jobs; was it written by lowrank?")


def load_or_create_assignment(
    output_dir: Path, names: Sequence[str], of: int, create: Callable[[], Mapping[str, int]]
) -> dict[str, int]:
    """Return the share of each job of `names`: as any share has assigned them before, else what `create` returns, which
    is written for all others. OutputError where the jobs, or their number of shares, are others than those on disk."""
    known = read_assignment(output_dir)
    if known is None:
        _write_once(output_dir / SHARES / ASSIGNMENT, {"of": of, "jobs": dict(create())})
        known = read_assignment(output_dir)
        assert known is not None
    number, jobs = known
    where = output_dir / SHARES
    if number != of:
        raise OutputError(
            f"{output_dir} was begun in {number} shares, now there are {of}; go on with as many, or choose another "
            f"output_dir (to begin anew here, delete {where})"
        )
    if {*jobs} != {*names}:
        other = sorted({*jobs} ^ {*names})
        raise OutputError(
            f"{output_dir}: the jobs are not those that were assigned to its shares: {', '.join(other[:6])}; choose "
            f"another output_dir (to begin anew here, delete {where})"
        )
    return jobs


def share_folders(output_dir: Path) -> list[Path]:
    """The run folders of the shares that have begun, in their order."""
    root = output_dir / SHARES
    return sorted(path for path in root.glob("*-of-*") if path.is_dir()) if root.is_dir() else []


def _write_once(path: Path, content: Mapping[str, object]) -> None:
    """The file, unless another process has written it in the meantime: then that one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links: the last one stays, and all wrote the same
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
