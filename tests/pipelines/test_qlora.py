"""Training on a base in 4 bits, from a configuration to an adapter: QLoRA."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from lowrank.adapters.routing import ForwardContext
from lowrank.config import RunConfig
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load
from lowrank.pipelines.inference import open_inference_model
from lowrank.pipelines.train import train
from lowrank.report.events import Event, StepDone
from tests.pipelines.test_train import Ear, run, settings, weights, world  # noqa: F401 (a fixture)

NF4 = {"type": "nf4", "double_quant": True}


def on_nf4(world: Path, out: Path, **changes: Any) -> dict[str, Any]:  # noqa: F811
    given = settings(world, out, **changes)
    return {**given, "model": {**given["model"], "storage": NF4}}


def test_jobs_on_one_base_resume_and_company(world: Path, tmp_path: Path) -> None:  # noqa: F811
    """Stopped after five steps and resumed: the same bits. Without the other job: the same, to rounding."""
    _, whole = run(on_nf4(world, tmp_path / "whole"))

    class Stop(Ear):
        def report(self, event: Event) -> None:
            super().report(event)
            if isinstance(event, StepDone) and event.job == "a" and event.step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    given = on_nf4(world, tmp_path / "parts")
    summary = train(RunConfig(**given), reporters=[Stop()])
    assert summary["interrupted"]
    run({**given, "resume": True})
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    name = given["jobs"][0]["name"]
    _, alone = run({**on_nf4(world, tmp_path / "alone"), "jobs": given["jobs"][:1]})
    assert alone.losses(name) == pytest.approx(whole.losses(name), rel=1e-4)


def test_peft_computes_the_same_on_the_dequantized_base(world: Path, tmp_path: Path) -> None:  # noqa: F811
    given = on_nf4(world, tmp_path / "out")
    run(given)
    base = load(ModelConfig.model_validate(given["model"]))
    plain = transformers.AutoModelForCausalLM.from_pretrained(world / "model")
    for name, module in base.model.named_modules():
        if hasattr(module, "dense_weight"):
            plain.get_submodule(name).weight.data.copy_(module.dense_weight())
    adapter = next((tmp_path / "out" / given["jobs"][0]["name"]).glob("best*"))
    theirs = PeftModel.from_pretrained(plain, str(adapter))
    token_ST = torch.arange(3, 20)[None]
    trained = open_inference_model(str(tmp_path / "out"))
    slot = trained.slots[given["jobs"][0]["name"]]
    routed = trained.bank.routing.using(ForwardContext(17, ((slot, 0, 17),)))
    with torch.no_grad(), routed, trained.base.using_attention("sdpa"):
        ours_STV = trained.base.model(token_ST).logits
        torch.testing.assert_close(ours_STV, theirs(token_ST).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_held_out_exact_match_is_within_two_points_of_the_16_bit_run(tmp_path: Path) -> None:
    """`lowrank demo`, on the base as it is and in 4 bits: minutes each."""
    scores = {}
    for storage in ("dense", "nf4"):
        command = [sys.executable, "-m", "lowrank", "demo", "--output-dir", str(tmp_path / storage), "--json"]
        done = subprocess.run([*command, f"model.storage={storage}"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        result = json.loads(done.stdout.splitlines()[-1])
        scores[storage] = result["exact_match"][result["best"]]
    assert scores["dense"] > 0.9
    assert abs(scores["nf4"] - scores["dense"]) <= 0.02, scores
