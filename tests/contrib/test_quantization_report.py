"""The report: bits as counted by hand, errors as the quantizers give them, one weight at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowrank.cli.main import main
from lowrank.contrib.quantization_report.measures import QuantizationReport
from lowrank.models.storages.hqq import HQQConfig
from lowrank.quantization.linear import asymmetric
from tests.checkpoint_folder import save_checkpoint_folder


def measured(**settings: int) -> tuple[QuantizationReport, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    weights = {"a": torch.randn(64, 256) * 0.02, "b": torch.distributions.StudentT(3.0).sample((128, 128))}
    report = QuantizationReport(**settings)
    for name, weight in weights.items():
        report.add(name, weight)
    return report, weights


def test_errors_are_those_of_all_weights_together() -> None:
    report, weights = measured()
    rows = {row["method"]: row for row in report.rows()}
    errors = {name: asymmetric(weight, 4, 64).weight() - weight for name, weight in weights.items()}
    squared = sum(float(error.square().sum()) for error in errors.values())
    count = sum(weight.numel() for weight in weights.values())
    assert rows["int4 asymmetric"]["mse"] == pytest.approx(squared / count, rel=1e-5)
    norm = sum(float(weight.square().sum()) for weight in weights.values())
    assert rows["int4 asymmetric"]["relative_error"] == pytest.approx((squared / norm) ** 0.5, rel=1e-5)
    assert rows["int4 asymmetric"]["worst_layer"] == "b", "heavy tails"
    worst = float(errors["b"].norm() / weights["b"].norm())
    assert rows["int4 asymmetric"]["worst_relative_error"] == pytest.approx(worst, rel=1e-5)


def test_bits_per_parameter() -> None:
    rows = {row["method"]: row["bits_per_parameter"] for row in measured()[0].rows()}
    assert rows["int4 symmetric"] == 4.25
    assert rows["int4 asymmetric"] == 4.25 + 4 / 64
    assert rows["nf4"] == 4.5
    assert rows["nf4 double"] == pytest.approx(4.127, abs=1e-3)
    assert rows["int8 per row"] == pytest.approx(8 + (32 / 256 + 32 / 128) / 2)
    layer = torch.nn.Linear(256, 64, bias=False)
    for bits in (2, 3, 4, 5, 6, 8):
        packed = HQQConfig(bits=bits).wrap(layer)  # type: ignore[arg-type]
        assert sum(buffer.nbytes for buffer in packed.buffers()) * 8 / (64 * 256) == rows[f"hqq{bits}"]


def test_a_sample_of_rows_comes_near_and_is_said() -> None:
    whole, _ = measured()
    part, _ = measured(most_weights=4096)
    assert (part.weights, part.looked_at) == (whole.weights, 2 * 4096)
    for row, other in zip(whole.rows(), part.rows()):
        if row["method"] == other["method"] and row["worst_layer"] == "a":
            assert row["worst_relative_error"] == pytest.approx(other["worst_relative_error"], rel=0.1)


def test_the_order_at_four_bits_on_normal_weights() -> None:
    report = QuantizationReport()
    report.add("w", torch.randn(128, 512, generator=torch.Generator().manual_seed(0)))
    error = {row["method"]: row["relative_error"] for row in report.rows()}
    assert error["hqq4"] < error["int4 asymmetric"] < error["nf4"] < error["int4 symmetric"] < error["fp4 double"]


def test_experts_are_matrices_under_one_another_and_the_plot_is_a_png(tmp_path: Path) -> None:
    from lowrank.contrib.quantization_report.plot import plot

    report = QuantizationReport()
    report.add("experts", torch.randn(4, 32, 64))
    assert report.weights == 4 * 32 * 64
    plot(report.rows(), tmp_path / "report.png", "experts")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def run(command: str, *arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main([command, *arguments])
    return int(caught.value.code or 0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_checkpoint_folder(tmp_path / "model", hidden_size=256, intermediate_size=512)
    picture = tmp_path / "report.png"
    assert run("quantization-report", str(folder), "--json", "--plot", str(picture)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layers"] == 14
    assert report["weights"] == report["weights_looked_at"]
    rows = {row["method"]: row for row in report["methods"]}
    assert rows["nf4 double"]["relative_error"] == pytest.approx(0.092, abs=0.002)
    assert rows["int8 per row"]["worst_layer"].startswith("model.layers.")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "report.png"]
    assert run("quantize", str(folder), "-o", str(tmp_path / "out"), "model.dtype=float32") == 0
    assert run("quantization-report", str(tmp_path / "out")) == 4
    assert "quantized already" in capsys.readouterr().err
    assert run("quantization-report", str(tmp_path / "nothing")) == 4
