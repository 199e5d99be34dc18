"""Memory in the views, and trackers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lowrank.errors import ConfigError
from lowrank.report.events import Event, Reporter
from lowrank.report.process_memory import MemoryUse, memory_use
from lowrank.report.reporters import recorders_for
from lowrank.report.reporters.metrics import MetricsReporter
from lowrank.report.reporters.terminal import _Sampled as Sampled
from lowrank.report.reporters.trackers import known_trackers
from tests.report.event_stream import TWO, loss_of, report_all, run_events


def test_memory_is_measured_and_its_peak_is_this_programs_own() -> None:
    used = memory_use()
    assert 10 * 2**20 < used.now <= used.peak
    assert used.device_now is None
    code = "from lowrank.report.process_memory import memory_use; import sys; print(memory_use().peak)"
    block = bytearray(2**28)  # a large parent must not count for its child
    block[::4096] = b"x" * len(block[::4096])
    assert memory_use().peak >= len(block)
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert child < len(block)


def test_sampling_is_rare() -> None:
    calls: list[str] = []

    def measure(device: str) -> MemoryUse:
        calls.append(device)
        return MemoryUse(1, 2)

    sampled = Sampled(measure, every=60.0)
    assert [sampled("cpu"), sampled("cpu"), sampled("cpu")] == [MemoryUse(1, 2)] * 3
    assert calls == ["cpu"]


def scalars_of(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return [(each.step, each.value) for each in read.Scalars(tag)]


def test_tensorboard_reads_our_curves_also_after_a_resume(tmp_path: Path) -> None:
    def trackers() -> list[Reporter]:
        return recorders_for(tmp_path, ["tensorboard"])

    report_all(run_events(TWO, tmp_path, until=11), *trackers())
    report_all(run_events(TWO, tmp_path, first=7), *trackers())
    assert sorted(path.name for path in (tmp_path / "tensorboard").iterdir()) == ["a", "b"]
    losses = scalars_of(tmp_path / "tensorboard" / "a", "train/loss")
    assert losses == [(step, pytest.approx(loss_of("a", step), rel=1e-6)) for step in (1, 5, 10, 15, 20)]
    held_out = scalars_of(tmp_path / "tensorboard" / "a", "eval/loss")
    assert [step for step, _ in held_out] == [4, 8, 12, 16, 20]
    assert scalars_of(tmp_path / "tensorboard" / "b", "train/rewards/margin.mean")[0] == (1, 0.5)


def test_missing_packages_are_named_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = [name for name in known_trackers() if name != "tensorboard"]
    assert absent
    for name in absent:  # as if not installed, wherever this runs
        monkeypatch.setitem(sys.modules, name, None)
    names = [*absent, "tensorboard", "tensorbord", "no_such_module:Thing"]
    with pytest.raises(ConfigError) as caught:
        recorders_for(tmp_path / "run", names)
    message = str(caught.value)
    for name in absent:
        assert f"pip install 'lowrank-llm[{name}]'" in message
    assert "did you mean 'tensorboard'?" in message
    assert "no_such_module" in message
    assert not (tmp_path / "run").exists()


class Collecting:
    """A third party's reporter."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir

    def report(self, event: Event) -> None: ...

    def close(self) -> None: ...


@pytest.mark.usefixtures("allowed_code")
def test_third_parties_reporters_are_found_by_name(tmp_path: Path) -> None:
    found = recorders_for(tmp_path, [f"{__name__}:Collecting"])
    assert type(found[-1]).__name__ == "Collecting"
    assert isinstance(found[0], MetricsReporter)
