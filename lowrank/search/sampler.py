"""Optuna as the sampler of a sweep, and as a place where its dashboard finds it.

What the sampler says is a function of the seed, the candidate's number and the results so far, so a sweep that goes on
from a checkpoint draws the same candidates again. The database is a copy for people, never read back.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank.errors import ConfigError
from lowrank.search.candidates import Candidate, name_of, num_trials
from lowrank.search.config import Draw, SweepConfig

if TYPE_CHECKING:
    from lowrank.search.sweep import Trial

DATABASE = "optuna.db"


def require_optuna() -> Any:
    """The package. ConfigError without it."""
    try:
        optuna = importlib.import_module("optuna")
    except ImportError:
        raise ConfigError("sweep: optuna is not installed: pip install 'lowrank-llm[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class OptunaSampler:
    """Draws candidates by TPE from those before."""

    def __init__(self, settings: SweepConfig) -> None:
        """ConfigError without optuna."""
        self._settings, self._optuna = settings, require_optuna()

    def propose(self, number: int, trials: Sequence[Trial]) -> Candidate:
        """The candidate `number`."""
        digest = hashlib.blake2b(f"{self._settings.seed} {number}".encode(), digest_size=4).digest()
        sampler = self._optuna.samplers.TPESampler(seed=int.from_bytes(digest, "little"), constant_liar=True)
        study = self._optuna.create_study(sampler=sampler)
        for trial in trials:
            study.add_trial(as_optuna(self._optuna, self._settings, trial))
        suggestion = study.ask(distributions(self._optuna, self._settings))
        values = {name: _plain(self._settings.random[name], suggestion.params[name]) for name in self._settings.random}
        return Candidate(name_of(number, num_trials(self._settings), values), values)


def distributions(optuna: Any, settings: SweepConfig) -> dict[str, Any]:
    """What can be drawn, in optuna's terms."""
    kinds = optuna.distributions
    found: dict[str, Any] = {}
    for name, draw in settings.random.items():
        if draw.choice is not None:
            found[name] = kinds.CategoricalDistribution(tuple(range(len(draw.choice))))
        elif draw.integer is not None:
            found[name] = kinds.IntDistribution(*draw.integer)
        else:
            low, high = draw.uniform or draw.log_uniform or (0.0, 1.0)
            found[name] = kinds.FloatDistribution(low, high, log=draw.log_uniform is not None)
    return found


def write_database(settings: SweepConfig, folder: Path, trials: Sequence[Trial]) -> None:
    """The whole sweep as `optuna.db`, in the place of the one before. ConfigError without optuna.

    What was not drawn by optuna stands there as categories.
    """
    optuna = require_optuna()
    partial = folder / f".{DATABASE}.partial"
    partial.unlink(missing_ok=True)
    storage = optuna.storages.RDBStorage(f"sqlite:///{partial}")
    try:
        study = optuna.create_study(storage=storage, study_name=folder.name, direction="minimize")
        if settings.sampler == "optuna":
            study.add_trials([as_optuna(optuna, settings, trial) for trial in trials])
        else:
            choices: dict[str, dict[str, None]] = {}
            for trial in trials:
                for name, value in trial.candidate.values.items():
                    choices.setdefault(name, {})[str(value)] = None
            kinds = {name: optuna.distributions.CategoricalDistribution(tuple(each)) for name, each in choices.items()}
            study.add_trials([_frozen(optuna, trial, _as_text(trial), kinds) for trial in trials])
    finally:
        storage.remove_session()
        storage.engine.dispose()
    partial.replace(folder / DATABASE)


def as_optuna(optuna: Any, settings: SweepConfig, trial: Trial) -> Any:
    """A candidate that optuna drew, with what came of it."""
    values = trial.candidate.values
    parameters = {name: _within(settings.random[name], values[name]) for name in settings.random}
    return _frozen(optuna, trial, parameters, distributions(optuna, settings))


def _frozen(optuna: Any, trial: Trial, parameters: Mapping[str, Any], kinds: Mapping[str, Any]) -> Any:
    """Pruned ones have the values of their rungs, running ones nothing yet."""
    states = optuna.trial.TrialState
    ended = states.COMPLETE if trial.best is not None and math.isfinite(trial.best) else states.FAIL
    state = states.RUNNING if trial.finished is None else states.PRUNED if trial.finished == "pruned" else ended
    return optuna.trial.create_trial(
        state=state,
        params={name: parameters[name] for name in kinds if name in parameters},
        distributions={name: kind for name, kind in kinds.items() if name in parameters},
        value=trial.best if state == states.COMPLETE else None,
        intermediate_values={int(step): value for step, value in trial.values if math.isfinite(value)},
        user_attrs={"job": trial.name},
    )


def _as_text(trial: Trial) -> dict[str, str]:
    return {name: str(value) for name, value in trial.candidate.values.items()}


def _within(draw: Draw, value: Any) -> Any:
    """As optuna has it: of choices the place, and what was rounded not beyond the bounds."""
    if draw.choice is not None:
        return list(draw.choice).index(value)
    low, high = draw.integer or draw.uniform or draw.log_uniform or (value, value)
    return min(max(value, low), high)


def _plain(draw: Draw, value: Any) -> Any:
    """As the settings have it."""
    if draw.choice is not None:
        return draw.choice[value]
    return int(value) if draw.integer is not None else float(f"{value:.4g}")
