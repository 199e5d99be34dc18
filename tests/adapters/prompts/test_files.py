"""Adapters of virtual tokens in PEFT's files, to PEFT and back, and in exports."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from lowrank.adapters.bank import Bank
from lowrank.adapters.prompts import TABLE
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import load_adapter, save_adapter
from lowrank.errors import ModelError
from lowrank.evaluate.likelihood import continuation_logprobs, label_logprobs
from lowrank.export.targets.lora_gguf import LoraGGUFExportConfig
from lowrank.export.targets.merged import MergedExportConfig
from lowrank.export.targets.peft import PeftExportConfig
from lowrank.models.config import ModelConfig
from lowrank.segments import Segment
from tests.adapters.peft_twins import on_disk
from tests.adapters.prompts.cases import (
    CASES,
    PEERS,
    PROMPTS,
    Peer,
    every_prompt,
    families,
)
from tests.export.sources import source_of
from tests.tiny_models import make_base, make_engine, make_model


@families("llama", "qwen3", "gpt2")
@every_prompt
def test_ours_to_peft_and_back(name: str, family: str, tmp_path: Path) -> None:
    engine, (slot,) = make_engine(make_base(family), PROMPTS[name])
    token_L = np.arange(3, 12)
    reads = [(slot, token_L[:1].tolist(), [int(token)]) for token in range(3, 60)]
    base = describe_base(engine.base.model, family)
    save_adapter(tmp_path / "a", on_disk(engine.bank, slot), base, dtype=None)
    assert load_file(tmp_path / "a" / "adapter_model.safetensors").keys() == {TABLE}
    twin = Peer(
        peft.PeftModel.from_pretrained(make_model(family), str(tmp_path / "a"), autocast_adapter_dtype=False).double()
    )
    with torch.no_grad():
        theirs_LV = twin(torch.from_numpy(token_L)[None]).logits[0].log_softmax(-1)
    segment = Segment(token_L, np.r_[0, np.ones(8)].astype(np.float32))
    ours_L = engine.logprobs(slot, [segment])[0]
    assert ours_L.shape == token_L.shape
    expected_L = theirs_LV[:-1].gather(1, torch.from_numpy(token_L)[1:, None])[:, 0]
    np.testing.assert_allclose(ours_L[1:], expected_L.numpy(), atol=1e-6)
    bare_L = engine.logprobs(-1, [segment])[0]
    assert np.abs(bare_L - ours_L).max() > 1e-3
    saved = load_adapter(tmp_path / "a")
    other = Bank(make_base(family))
    again = other.add(saved.config, seed=9)
    other.load(again, saved.tensors)
    mine, theirs = (
        [
            described
            for described, _ in continuation_logprobs(
                bank.base, bank, [(own, context, answer) for _, context, answer in reads]
            )
        ]
        for bank, own in ((engine.bank, slot), (other, again))
    )
    np.testing.assert_allclose(mine, theirs, atol=1e-10)
    sums = label_logprobs(engine.base, engine.bank, [(slot, segment), (-1, segment)])
    np.testing.assert_allclose(sums[:, 0], [ours_L.sum(), bare_L.sum()], atol=1e-5)
    assert sums[:, 1].tolist() == [8, 8]


@pytest.mark.parametrize("case", CASES)
def test_pefts_to_ours(case: str, tmp_path: Path) -> None:
    twin = peft.get_peft_model(make_model("llama"), copy.deepcopy(PEERS[case])).double().eval()
    twin.save_pretrained(str(tmp_path / "a"))
    saved = load_adapter(tmp_path / "a")
    bank = Bank(make_base("llama"))
    slot = bank.add(saved.config, seed=0)
    bank.load(slot, saved.tensors)
    token_L = torch.tensor([5, 9, 11, 3, 8])
    with torch.no_grad():
        theirs = Peer(twin)(token_L[None]).logits[0].log_softmax(-1)[-1]
    ours = continuation_logprobs(bank.base, bank, [(slot, token_L.tolist(), [token]) for token in range(97)])
    np.testing.assert_allclose(
        [described for described, _ in ours], theirs.numpy(), atol=1e-6
    )  # files of P-tuning are float32


def test_exports_say_what_they_cannot_take_in(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "base")
    engine, (slot,) = make_engine(make_base("llama"), PROMPTS["prefix_tuning"])
    settings = ModelConfig(path=str(tmp_path / "base"), device="cpu", dtype="float64")
    source = replace(source_of(tmp_path / "base", on_disk(engine.bank, slot)), tokenizer=object(), model=settings)
    for target in (MergedExportConfig(), LoraGGUFExportConfig()):
        with pytest.raises(ModelError, match="mine: prefix_tuning 5 tokens: its virtual tokens are no weights"):
            target.build().needs(source)
    target = PeftExportConfig().build()
    target.needs(source)
    (tmp_path / "out").mkdir()
    target.write(source, tmp_path / "out", lambda done, total: None)
    assert load_adapter(tmp_path / "out").config == PROMPTS["prefix_tuning"]
    token_L = np.arange(3, 9)
    (reading,) = target.read_back(source, tmp_path / "out")
    with reading.open() as reader:
        exported_LV = reader.logprobs(token_L)
    assert exported_LV.shape == (6, 97)
    ours_L = engine.logprobs(slot, [Segment(token_L, np.r_[0, np.ones(5)].astype(np.float32))])[0]
    np.testing.assert_allclose(exported_LV[np.arange(5), token_L[1:]], ours_L[1:], atol=1e-4)


def test_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    engine, (slot,) = make_engine(make_base("llama"), PROMPTS["prefix_tuning"])
    save_adapter(tmp_path / "a", on_disk(engine.bank, slot), describe_base(engine.base.model, "llama"))
    card = (tmp_path / "a" / "README.md").read_text()
    assert "A `prefix_tuning 5 tokens` adapter" in card
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_virtual_tokens": 7}))
    with pytest.raises(ModelError, match=r"prompt_embeddings: shape \(5, 64\), expected \(7, ...\)"):
        load_adapter(tmp_path / "a")
