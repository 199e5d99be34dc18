"""Train the tokenizer of the embedded base, and write it with an untrained model to a folder.

    python examples/tiny-base/tokenizer.py CORPUS.jsonl OUT_FOLDER

Byte-level BPE with the text split as Qwen2 splits it, which other tools know by name. Digits stand one by one, so that
numbers can be copied and compared. Merges are learned from text cut at every Chinese character, so a
Chinese character is one token (or its bytes), never part of a longer one: names are copied character by character.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from start import make_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from words import COMMON, COMMON_WORDS, KEYS

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 3072
LEXICON_WEIGHT = 3000
CHARACTERS = r"[\u4e00-\u9fff]"
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def texts(corpus: Path) -> Iterator[str]:
    """The documents without the special tokens, and many times over what should be one token each."""
    for _ in range(LEXICON_WEIGHT):
        yield COMMON + " " + " ".join(COMMON_WORDS) + "\n" + "\n".join(KEYS)
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"].replace(START, "").replace(END, "")


def pre_tokenizer(*, alone: bool) -> pre_tokenizers.PreTokenizer:
    """Qwen2's; `alone` also cuts at every Chinese character."""
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")]
    if alone:
        steps.append(pre_tokenizers.Split(Regex(CHARACTERS), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(steps)


def train_tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    """Merges within a character never join it to the next one, so the cut at characters is for training only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer(alone=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(corpus), trainer)
    tokenizer.pre_tokenizer = pre_tokenizer(alone=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """In the words that transformers 4 and 5 both understand."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("backend", None)
    config.pop("extra_special_tokens", None)
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": [START]}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    corpus, out = Path(sys.argv[1]), Path(sys.argv[2])
    tokenizer = train_tokenizer(corpus)
    model = make_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out)
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters -> {out}")


if __name__ == "__main__":
    main()
