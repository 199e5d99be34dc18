"""Which candidates go on, against Optuna's pruner and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lowrank.search.candidates import first_candidates
from lowrank.search.config import SweepConfig
from lowrank.search.halving import GO, HOLD, PRUNE, Halving, rung_shares, rung_steps
from lowrank.search.sweep import Sweep


def test_rungs_leave_about_one() -> None:
    assert rung_shares(16, 4, None) == [1 / 16, 1 / 4]
    assert rung_shares(27, 3, None) == pytest.approx([1 / 27, 1 / 9, 1 / 3])
    assert rung_shares(3, 4, None) == [1 / 4], "even of few candidates not all are trained to their end"
    assert rung_shares(1000, 4, 0.1) == pytest.approx([0.1, 0.4])
    assert rung_shares(16, 4, None, warmup=1 / 32) == [1 / 16, 1 / 4]
    assert rung_shares(16, 4, None, warmup=1 / 8) == [1 / 4], "within the warmup no learning rate was tried yet"
    assert rung_shares(16, 4, None, warmup=1 / 2) == [1 / 4], "the last stays, or nothing would be searched"
    assert rung_shares(16, 4, 1 / 16, warmup=1 / 8) == [1 / 16, 1 / 4], "as somebody wants it"
    assert rung_steps([1 / 16, 1 / 4], 100) == [7, 25]
    assert rung_steps([1 / 16, 1 / 4], 3) == [1], "never the same step twice, and never the end"


def test_asha_decides_about_those_that_come_together_by_all_of_them() -> None:
    asha = Halving(4, waits=False)
    decided = asha.arrived(0, {name: value for value, name in enumerate("abcdefgh")})
    assert [name for name, what in decided.items() if what == GO] == ["a", "b"]
    assert asha.arrived(0, {"i": 1.5}) == {"i": PRUNE}, "third of nine; one in four goes on"
    assert asha.arrived(0, {"j": -1.0}) == {"j": GO}
    assert asha.arrived(0, {"k": math.nan}) == {"k": PRUNE}


def test_asha_one_after_another_is_optunas_pruner() -> None:
    """Against its decisions on the same values, which it writes as completed rungs."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=4, min_early_stopping_rate=0)
    study = optuna.create_study(direction="minimize", pruner=pruner)
    asha, generator = Halving(4, waits=False), np.random.default_rng(0)
    for number in range(40):
        trial, value = study.ask(), float(generator.normal())
        trial.report(value, 1)
        pruned = trial.should_prune()
        study.tell(trial, state=optuna.trial.TrialState.PRUNED if pruned else None, values=None if pruned else [value])
        assert asha.arrived(0, {str(number): value}) == {str(number): PRUNE if pruned else GO}


def test_successive_halving_waits_for_all() -> None:
    halving = Halving(2, waits=True)
    halving.alive = list("abcd")
    assert halving.arrived(0, {"a": 3.0, "b": 2.0}) == {"a": HOLD, "b": HOLD}
    assert halving.arrived(0, {"c": 1.0}) == {"c": HOLD}
    halving.load_state(halving.state())
    assert halving.arrived(0, {"d": 4.0}) == {"a": PRUNE, "b": GO, "c": GO, "d": PRUNE}
    assert halving.left("a") == {}
    assert halving.arrived(1, {"b": 0.5}) == {"b": HOLD}
    assert halving.left("c") == {"b": GO}, "the other ended for a reason of its own"


def test_one_that_cannot_begin_decides_about_those_that_waited_and_that_is_noted() -> None:
    settings = SweepConfig(candidates=({"seed": 0}, {"seed": 1}, {"seed": 2}), search="successive_halving")
    sweep = Sweep(settings, first_candidates(settings), "loss")
    first, second, third = sweep.trials
    state = sweep.state()
    state["halving"]["results"] = [{first: 2.0, second: 1.0}]
    sweep.load_state(state)
    assert sweep.on_failed("a job that is no candidate", "failed") == {}
    assert sweep.on_failed(third, "failed") == {first: PRUNE, second: GO}
    assert [trial.finished for trial in sweep.trials.values()] == ["pruned", None, "failed"]
