"""`share=3/16`: which part of a run's jobs this machine trains."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lowrank.errors import ConfigError

FROM_ENVIRONMENT = "auto"
PATTERN = r"^(auto|[1-9][0-9]{0,5}/[1-9][0-9]{0,5})$"

_SET_BY = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("RANK", "WORLD_SIZE", None),
    ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", None),
    ("SLURM_PROCID", "SLURM_NTASKS", None),
)
"""Variables with the number of this one, how many there are, and the number of the first (None: 0). A task of an array
may have tasks of its own, and torchrun may run within Slurm: the first that is there is meant."""


@dataclass(frozen=True)
class Share:
    """`number` of `of`; 1 is the first."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def folder(self) -> str:
        """Its name as a folder, which sorts as the numbers do."""
        return f"{self.number:0{len(str(self.of))}d}-of-{self.of}"


def read_share(text: str, environment: Mapping[str, str]) -> Share:
    """What `share: 3/16` or `share: auto` means here. ConfigError for a number beyond its end, and where nothing in the
    environment says."""
    if text == FROM_ENVIRONMENT:
        return _of_environment(environment)
    number, of = map(int, text.split("/"))
    if number > of:
        raise ConfigError(f"share: {text}: there are only {of}; the first is 1/{of}, the last {of}/{of}")
    return Share(number, of)


def _of_environment(environment: Mapping[str, str]) -> Share:
    for number_in, of_in, first_in in _SET_BY:
        number, of = environment.get(number_in, ""), environment.get(of_in, "")
        if not (re.fullmatch("[0-9]{1,6}", number) and re.fullmatch("[0-9]{1,6}", of)):
            continue
        first = environment.get(first_in, "0") if first_in else "0"
        place = int(number) - (int(first) if re.fullmatch("[0-9]{1,6}", first) else 0)
        if not 0 <= place < int(of):
            raise ConfigError(
                f"share: auto: {number_in}={number} and {of_in}={of} are no number among so many (an array's tasks are "
                "to follow one another: --array=1-16); say it, as share: 3/16"
            )
        return Share(place + 1, int(of))
    known = ", ".join(f"{number} and {of}" for number, of, _ in _SET_BY)
    raise ConfigError(f"share: auto: the environment does not say which share this is ({known}); say share: 3/16")
