"""Merged models in few bits: read back by other programs, and the better for having seen the user's texts."""

from __future__ import annotations

import json
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import lowrank.data.demo as demo
from lowrank.adapters.variants import lora
from lowrank.errors import ModelError
from lowrank.export.merge.merged import Merged
from lowrank.export.merge.weights import Weights
from lowrank.export.source import Source
from lowrank.export.targets.awq import AWQExportConfig
from lowrank.export.targets.compressed_tensors import CompressedTensorsExportConfig
from lowrank.export.targets.gptq import GPTQExportConfig
from lowrank.export.targets.merged import MergedExportConfig
from lowrank.export.targets.merged_4bit import Merged4bitExportConfig
from lowrank.export.verify.readers import read_adapter, read_model
from lowrank.models.loading.pretrained import TINY, locate
from lowrank.segments import unweighted
from tests.checkpoint_folder import save_checkpoint_folder
from tests.checkpoints.test_peft_layout import random_adapter
from tests.export.sources import load, make_source, source_of, write_merged

TOKEN_L = np.arange(3, 40)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A base with a tokenizer, an adapter, and documents."""
    base = save_checkpoint_folder(tmp_path_factory.mktemp("world") / "base", hidden_size=64, intermediate_size=128)
    adapter = random_adapter(load(base, torch.float32), lora.LoraConfig(rank=4))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    found = source_of(base, adapter, documents=lambda count: list(map(unweighted, documents())))
    return Source(
        **{**vars(found), "tokenizer": tokenizer, "model": found.model.model_copy(update={"dtype": "float32"})}
    )


def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 250, 60) for _ in range(24)]


def write(config: Any, source: Source, folder: Path) -> Path:
    target = config.build()
    target.needs(source)
    folder.mkdir()
    target.write(source, folder, lambda done, total, what="": None)
    return folder


def logprobs(source: Source, folder: Path) -> np.ndarray:
    with read_model(source, folder) as reader:
        return reader.logprobs(TOKEN_L)


def kl(reference: np.ndarray, own: np.ndarray) -> float:
    return float((np.exp(reference) * (reference - own)).sum(-1).mean())


CONFIGS = {
    "merged_4bit": Merged4bitExportConfig(),
    "merged_4bit single": Merged4bitExportConfig(double_quant=False, block_size=32),
    "compressed 4": CompressedTensorsExportConfig(),
    "compressed 8": CompressedTensorsExportConfig(bits=8, group_size=-1),
    "gptq 2": GPTQExportConfig(bits=2),
    "gptq 3": GPTQExportConfig(bits=3),
    "gptq 4": GPTQExportConfig(group_size=32),
    "gptq 8": GPTQExportConfig(bits=8),
    "gptq 4 asymmetric": GPTQExportConfig(symmetric=False),
    "awq": AWQExportConfig(),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_our_readers_read_what_was_packed(case: str, source: Source, tmp_path: Path) -> None:
    """The weights in the files are those that packing said a reader would get, to the last bit but the dtype's."""
    target = CONFIGS[case].model_copy(update={"calibrate": False}).build()
    target.needs(source)
    (tmp_path / "out").mkdir()
    target.write(source, tmp_path / "out", lambda done, total, what="": None)
    merged = Merged(source)
    with read_model(source, tmp_path / "out") as reader:
        modules = dict(reader.base.model.named_modules())
        for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
            exact_OD = merged.tensor(f"{name}.weight", torch.float32)
            _, value_OD = target.form.pack(exact_OD, None, torch.float32)
            layer = getattr(modules[name], "base", modules[name])
            torch.testing.assert_close(layer.dense_weight().float(), value_OD, rtol=1e-5, atol=1e-6)
            most = {"2": 0.6, "3": 0.25, "8": 0.02}.get(case[-1], 0.12)
            assert (value_OD - exact_OD).norm() < most * exact_OD.norm()


@pytest.mark.parametrize("config", [Merged4bitExportConfig(), GPTQExportConfig(bits=3)], ids=["NF4", "GPTQ 3"])
@pytest.mark.slow
def test_calibrated_is_nearer(config: Any, tmp_path: Path) -> None:
    """The shipped base, on texts of its own kind, against rounding to the nearest: half the distance or less."""
    base = locate(TINY)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in (Path(demo.__file__).parent / "train.jsonl").read_text().splitlines()[:40]]
    texts = [np.asarray(tokenizer(json.dumps(row, ensure_ascii=False)).input_ids[:120], np.int64) for row in rows]
    found = source_of(Path(base), None, documents=lambda count: list(map(unweighted, texts[:32])))
    model = found.model.model_copy(update={"dtype": "float32"})
    own = Source(**{**vars(found), "tokenizer": tokenizer, "model": model})
    rounded = write(config.model_copy(update={"calibrate": False}), own, tmp_path / "rounded")
    calibrated = write(config, own, tmp_path / "calibrated")

    def logits_of(folder: Path) -> np.ndarray:
        with read_model(own, folder) as reader:
            return np.concatenate([reader.logprobs(text) for text in texts[32:40]])

    reference = logits_of(Path(base))
    assert kl(reference, logits_of(calibrated)) < 0.5 * kl(reference, logits_of(rounded))


def test_awq_scales_stand_in_the_files(source: Source, tmp_path: Path) -> None:
    """Norms and weights changed together: what is read back is the merged model, and not only its linears."""
    folder = write(AWQExportConfig(), source, tmp_path / "out")
    merged = Merged(source)
    tensors = load_file(folder / "model.safetensors")
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(tensors[norm], merged.tensor(norm))
    assert torch.equal(tensors["model.norm.weight"], merged.tensor("model.norm.weight"))
    assert kl(logprobs(source, write_merged(source, tmp_path / "merged")), logprobs(source, folder)) < 0.1


@pytest.mark.parametrize(
    "config",
    [Merged4bitExportConfig(), Merged4bitExportConfig(double_quant=False, calibrate=False)],
    ids=["double", "single"],
)
def test_transformers_and_bitsandbytes_load_it(config: Merged4bitExportConfig, source: Source, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    folder = write(config, source, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False
        theirs = model(torch.tensor(TOKEN_L)[None]).logits[0].log_softmax(-1).detach().numpy()
    assert isinstance(model.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    np.testing.assert_allclose(theirs, logprobs(source, folder), atol=2e-4)


@pytest.mark.parametrize(
    "config",
    [CompressedTensorsExportConfig(), CompressedTensorsExportConfig(bits=8, group_size=-1)],
    ids=["W4A16", "W8A16"],
)
def test_transformers_and_compressed_tensors_load_it(
    config: CompressedTensorsExportConfig, source: Source, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    folder = write(config, source, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs = model(torch.tensor(TOKEN_L)[None]).logits[0].log_softmax(-1).detach().numpy()
    np.testing.assert_allclose(theirs, logprobs(source, folder), atol=2e-4)


@pytest.mark.parametrize(
    "config",
    [GPTQExportConfig(bits=3), Merged4bitExportConfig(), CompressedTensorsExportConfig(bits=8)],
    ids=["gptq", "NF4", "compressed"],
)
def test_a_base_that_is_quantized_already(config: Any, source: Source, tmp_path: Path) -> None:
    """An adapter on it is merged into the weights as they unpack, which is said; the result is a plain model."""
    packed = write(config.model_copy(update={"calibrate": False}), source, tmp_path / "packed")
    model = source.model.model_copy(update={"path": str(packed)})
    onto = replace(source, base=packed, model=model)
    (note,) = MergedExportConfig().build().needs(onto).notes
    assert "weights as they unpack, since the base's files hold no others" in note
    out = write_merged(onto, tmp_path / "out")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    with read_adapter(onto, onto.adapter) as reader:
        expected = reader.logprobs(TOKEN_L)
    assert kl(logprobs(source, packed), expected) > 1e-4
    np.testing.assert_allclose(logprobs(source, out), expected, atol=1e-4)
    with pytest.raises(ModelError, match=r"quantized already \(.*\), and twice is worse"):
        GPTQExportConfig().build().needs(onto)


def test_threads_are_given_the_weight_they_ask_for(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two linears of one shape by turns: of a base in 4 bits gate's rows could be merged into up's, without a word.
    What is kept is kept by one thread at a time."""
    packed = write(Merged4bitExportConfig(calibrate=False), source, tmp_path / "packed")
    weights = Weights(packed)
    names = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")] * 40
    expected = {name: weights[name].read() for name in set(names)}
    reader: Any = weights[names[0]].unpacker.reader  # type: ignore[attr-defined]
    building, at_once, build = [0], [0], reader.build

    def watched(*given: Any) -> Any:
        building[0] += 1
        at_once[0] = max(at_once[0], building[0])
        time.sleep(2e-3)
        building[0] -= 1
        return build(*given)

    monkeypatch.setattr(reader, "build", watched)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: torch.equal(weights[name].rows(0, 1 << 20), expected[name]), names))
    assert found == [True] * len(names)
    assert at_once == [1]


def test_shards_and_what_stays(source: Source, tmp_path: Path) -> None:
    folder = write(GPTQExportConfig(max_shard_size="40KB", calibrate=False), source, tmp_path / "out")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"].values()) == {path.name for path in folder.glob("*.safetensors")}
    assert "model.embed_tokens.weight" in index["weight_map"]
    assert "model.layers.0.mlp.up_proj.qweight" in index["weight_map"]
    assert np.isfinite(logprobs(source, folder)).all()


def test_layers_are_calibrated_in_order(source: Source) -> None:
    """The moments of the second layer's first linear are those of its input after the first layer was replaced."""
    from lowrank.export.quantize.calibration import quantize_in_order

    merged = Merged(source)
    linears = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    seen: dict[str, torch.Tensor] = {}

    def zeroed(name: str, weight_OD: torch.Tensor, moment_DD: torch.Tensor | None) -> torch.Tensor:
        assert moment_DD is not None
        seen[name] = moment_DD
        return torch.zeros_like(weight_OD)

    quantize_in_order(source, merged, linears, list(map(unweighted, documents()[:2])), zeroed, lambda done, total: None)
    model = load(source.base, torch.float32)
    model.load_state_dict({name: merged.tensor(name) for name in merged}, strict=False)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
        inputs = []
        model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(
            lambda module, given: inputs.append(given[0][0])
        )
        for document in documents()[:2]:
            model(torch.tensor(document)[None])
    x_TD = torch.cat(inputs)
    torch.testing.assert_close(seen[linears[1]], x_TD.t() @ x_TD / len(x_TD), rtol=1e-4, atol=1e-5)


def test_refusals(source: Source, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="group_size 48 does not divide the 64 inputs"):
        GPTQExportConfig(group_size=48).build().needs(source)
    moe = make_source(tmp_path / "moe", None, "mixtral", torch.float32)
    with pytest.raises(ModelError, match="mixture of experts"):
        Merged4bitExportConfig().build().needs(moe)
    gpt2 = make_source(tmp_path / "gpt2", None, "gpt2", torch.float32)
    with pytest.raises(ModelError, match="no linear layer"):
        CompressedTensorsExportConfig().build().needs(gpt2)
