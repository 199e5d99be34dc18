"""Small real tokenizers, trained on the spot, with the special tokens of the well-known families."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import trl
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "What is the capital of France? The capital of France is Paris.",
    "You are a helpful assistant. Write a response that appropriately completes the request.",
    "Instruction: translate to Chinese. system user assistant model think question answer",
    "你好,世界。今天天气很好,我们去公园散步吧。法国的首都是巴黎。",
    "def add(a, b):\n    return a + b\n\n\n1 + 2 = 3 🙂🚀",
]

VOCABULARY = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen cuts text into words."""

FAMILIES: dict[str, tuple[str, str | None, str]] = {
    # added tokens, BOS, EOS
    "qwen2_5": ("<|endoftext|> <|im_start|> <|im_end|> <tool_call> </tool_call>", None, "<|im_end|>"),
    "qwen3": (
        "<|endoftext|> <|im_start|> <|im_end|> <think> </think> <tool_call> </tool_call>",
        None,
        "<|im_end|>",
    ),
    "llama3": (
        "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|end_of_text|>",
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "phi3": ("<s> <|endoftext|> <|system|> <|user|> <|assistant|> <|end|>", "<s>", "<|endoftext|>"),
    "gemma": ("<bos> <eos> <start_of_turn> <end_of_turn>", "<bos>", "<eos>"),
    "deepseekv3": (
        "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜> <｜tool▁calls▁begin｜> "
        "<｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜> "
        "<｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜>",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
    "glm4moe": (
        "<|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <think> </think> <tool_call> "
        "</tool_call> <arg_key> </arg_key> <arg_value> </arg_value> /nothink",
        None,
        "<|endoftext|>",
    ),
    "gptoss": (
        "<|startoftext|> <|endoftext|> <|return|> <|channel|> <|start|> <|end|> <|message|> <|call|> <|constrain|>",
        "<|startoftext|>",
        "<|return|>",
    ),
    "cohere": (
        "<BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|>",
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "mistral": ("<s> </s> [INST] [/INST]", "<s>", "</s>"),
    "paligemma": ("<bos> <eos> <start_of_turn> <end_of_turn> <image>", "<bos>", "<eos>"),
    "plain": ("<|endoftext|>", None, "<|endoftext|>"),
}


def trl_template(name: str) -> str:
    """A family's original chat template, as TRL keeps it for comparison."""
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def _trained(added: tuple[str, ...], bos: str | None, metaspace: bool) -> str:
    """The tokenizer as JSON; it adds `bos` by itself unless that is None."""
    core = Tokenizer(models.BPE(byte_fallback=metaspace, unk_token="<unk>" if metaspace else None))
    if metaspace:  # as Llama 2, Mistral, Phi-3, Gemma
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
        special = ["<unk>", *added, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special, show_progress=False)
    else:  # as Llama 3, Qwen
        core.normalizer = normalizers.NFC()
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(VOCABULARY), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=list(added),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    core.train_from_iterator(TEXTS, trainer)
    if bos is not None:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return core.to_str()


def tokenizer_of(
    family: str, chat_template: str | None = None, *, adds_bos: bool | None = None, metaspace: bool = False
) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of a family. It adds BOS by itself if the family has one, unless said otherwise."""
    added, bos, eos = FAMILIES[family]
    core = Tokenizer.from_str(_trained(tuple(added.split()), None if adds_bos is False else bos, metaspace))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = chat_template
    return tokenizer


def tokenizer_with(added: list[str], chat_template: str) -> PreTrainedTokenizerFast:
    """A tokenizer with these added tokens, BOS `<s>` and EOS `</s>`."""
    core = Tokenizer.from_str(_trained(("<s>", "</s>", *added), None, False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer
