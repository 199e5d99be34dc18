"""Tokens of the exported file against the tokenizer's own, asked of llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import lowrank.models.tiny
from lowrank.errors import ModelError
from lowrank.export.gguf import pretokenizers
from lowrank.export.gguf.convert import convert
from lowrank.export.gguf.corpus import CORPUS, PLAIN
from lowrank.export.gguf.llama_cpp import LlamaCpp
from lowrank.export.gguf.tokenizer_check import compare_tokenizers
from tests.data.made_tokenizers import TEXTS, tokenizer_of
from tests.export.gguf.families import save

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

TINY = Path(lowrank.models.tiny.__file__).parent


def exported(tmp_path, tokenizer, *, size: int | None = None) -> Path:
    """A GGUF file of a small model with this tokenizer."""
    model = save("llama", tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model.resize_token_embeddings(size or len(tokenizer))
    model.save_pretrained(tmp_path)
    convert(tmp_path, tmp_path / "model.gguf", "f16")
    return tmp_path / "model.gguf"


def byte_level(*steps) -> dict:
    """A tokenizer.json trained on the spot with these cuts, as a dict."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([*TEXTS, *CORPUS], trainer)
    return json.loads(core.to_str())


@pytest.mark.parametrize("preset", pretokenizers.PRESETS, ids=lambda preset: preset.name)
def test_llama_cpp_cuts_as_the_preset_says(preset, tmp_path):
    described = byte_level()
    described = pretokenizers.as_preset(described, preset)
    assert pretokenizers.choose(described, CORPUS).note is None
    tokenizer = tokenizer_of("qwen2_5")
    save("llama", tmp_path)
    path = exported(tmp_path, tokenizer, size=1000)
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    convert(tmp_path, path, "f16")
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() in (preset.name, "llama-bpe")
    comparison = compare_tokenizers(path, tmp_path)
    assert comparison.share < 0.01, comparison


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gptoss", "deepseekv3"])
def test_special_tokens_and_torture_texts(family, tmp_path):
    path = exported(tmp_path, tokenizer_of(family))
    comparison = compare_tokenizers(path, tmp_path)
    assert not comparison.different, comparison


@pytest.mark.parametrize("prefix", [True, False], ids=["Llama 2", "Gemma"])
def test_sentencepiece_like(prefix, tmp_path):
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], max_token_length=6, show_progress=False
    )
    comparison = [f"▁{argument}" for text in [*TEXTS, *PLAIN] for argument in text.split()]
    core.train_from_iterator([argument for argument in comparison if len(argument) < 12], trainer)
    described = json.loads(core.to_str())
    described["added_tokens"] = described["added_tokens"][:3]
    described["model"]["merges"] = all_merges(described["model"]["vocab"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), bos_token="<s>", eos_token="</s>"
    )
    path = exported(tmp_path, tokenizer)
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.model"].contents() == "llama"
    comparison = compare_tokenizers(path, tmp_path, [text for text in CORPUS if text])
    special = [text for text in comparison.different if text.startswith("before")]
    assert comparison.different == tuple(special), comparison


def all_merges(vocabulary):
    """Every way to make a token of two others, as transformers writes them for a SentencePiece model."""
    found = []
    for token, number in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((number, vocabulary[left], vocabulary[right], [left, right]))
    return [pair for *_, pair in sorted(found)]


def test_the_shipped_base(tmp_path):
    convert(TINY, tmp_path / "tiny.gguf")
    assert not compare_tokenizers(tmp_path / "tiny.gguf", TINY).different


def test_a_padded_embedding_and_beginning_of_text(tmp_path):
    tokenizer = tokenizer_of("llama3")
    path = exported(tmp_path, tokenizer, size=len(tokenizer) + 24)
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == len(tokenizer) + 24
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
    with LlamaCpp(path, vocab_only=True) as llama:
        assert llama.tokenize(["Hello"], add_special=True)[0] == tokenizer("Hello").input_ids
        assert llama.tokenize(["Hello"])[0] == tokenizer("Hello", add_special_tokens=False).input_ids


def test_the_end_of_a_turn_ends_the_answer(tmp_path):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_of("qwen2_5", template.replace("</s>", "<|im_start|>"))
    fields = gguf.GGUFReader(exported(tmp_path, tokenizer)).fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template


def test_a_way_of_cutting_that_llama_cpp_lacks_is_refused():
    described = byte_level(pre_tokenizers.Split(Regex("."), "isolated"))
    described["pre_tokenizer"]["pretokenizers"][0] = {
        "type": "Split", "pattern": {"Regex": "[a-m]+|[n-z]+"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    comparison = byte_level(pre_tokenizers.Split(Regex(r"\s+"), "isolated"))
    comparison["pre_tokenizer"] = described["pre_tokenizer"]
    with pytest.raises(ModelError, match=r"unknown pre-tokenizer; the nearest of llama\.cpp's"):
        pretokenizers.choose(comparison, CORPUS)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    save("llama", tmp_path)
    tokenizer = tokenizer_of("qwen2_5")
    tokenizer.add_tokens([f"new{index}" for index in range(200)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="only 640 rows"):
        convert(tmp_path, tmp_path / "model.gguf")
