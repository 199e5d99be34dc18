"""Unsloth's names of chat templates, and what stands for each here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.data import templates
from lowrank.errors import ConfigError, ModelError, did_you_mean

_FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class TemplateKind:
    """A template: the tokenizer's own where it has the mark `own`, else `built_in` (None: nothing else will do)."""

    built_in: str | None = None
    own: str | None = None


_CHATML, _GEMMA, _LLAMA3 = TemplateKind("chatml"), TemplateKind("gemma"), TemplateKind("llama3")
_LLAMA31, _GEMMA3 = TemplateKind("llama3", "<|start_header_id|>"), TemplateKind("gemma", "<start_of_turn>")
_QWEN3, _LFM2 = TemplateKind("qwen", "<|im_start|>"), TemplateKind("chatml", "<|im_start|>")
_GEMMA4, _GPT_OSS = TemplateKind(None, "<|turn>"), TemplateKind(None, "<|channel|>")
_PHI3 = TemplateKind("phi3")
KINDS = {
    "unsloth": TemplateKind("unsloth"), "zephyr": TemplateKind("zephyr"), "chatml": _CHATML,
    "mistral": TemplateKind("mistral"), "llama": TemplateKind("llama2"), "llama-2": TemplateKind("llama2"),
    "vicuna": TemplateKind("vicuna"), "vicuna_old": TemplateKind("vicuna_old"),
    "vicuna old": TemplateKind("vicuna_old"), "alpaca": TemplateKind("alpaca"), "gemma": _GEMMA,
    "gemma_chatml": _CHATML, "gemma2": _GEMMA, "gemma-2": _GEMMA, "gemma2_chatml": _CHATML, "llama-3": _LLAMA3,
    "llama3": _LLAMA3, "llama-3.1": _LLAMA31, "llama-31": _LLAMA31, "llama-3.2": _LLAMA31, "llama-3.3": _LLAMA31,
    "llama-32": _LLAMA31, "llama-33": _LLAMA31, "phi-3": _PHI3, "phi-35": _PHI3, "phi-3.5": _PHI3,
    "phi-4": TemplateKind("phi4", "<|im_sep|>"), "qwen-2.5": TemplateKind("qwen"), "qwen-25": TemplateKind("qwen"),
    "qwen25": TemplateKind("qwen"), "qwen2.5": TemplateKind("qwen"), "gemma-3": _GEMMA3, "gemma3": _GEMMA3,
    "gemma-3n": _GEMMA3, "gemma3n": _GEMMA3, "gemma-4": _GEMMA4, "gemma4": _GEMMA4, "gemma-4-thinking": _GEMMA4,
    "gemma4-thinking": _GEMMA4, "gpt-oss": _GPT_OSS, "gptoss": _GPT_OSS, "qwen-3": _QWEN3, "qwen3": _QWEN3,
    "qwen3-instruct": _QWEN3, "qwen3-thinking": _QWEN3, "lfm-2": _LFM2, "lfm-2.5": _LFM2,
    "starling": TemplateKind("starling"), "yi-chat": _CHATML,
}  # fmt: skip
"""Every name that Unsloth knows."""


def text_of(tokenizer: Any, name: str) -> str:
    """The Jinja text for a name of Unsloth's, one of ours, or a .jinja file.

    Raises ConfigError for no such name, ModelError where the tokenizer lacks its tokens.
    """
    kind = KINDS.get(name)
    if kind is None:
        if name in templates.names() or Path(name).is_file():
            return templates.choose(tokenizer, name)
        known = sorted({*KINDS, *templates.names()})
        raise ConfigError(
            f"there is no template {name!r}{did_you_mean(name, known)}\n  expected one of {', '.join(known)}, a .jinja "
            "file, or (Jinja text, EOS)"
        )
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if kind.own is not None and own and kind.own in own:
        return own
    if kind.built_in is None:
        raise ModelError(f"{name}: this tokenizer has no template with {kind.own}, and none is built in; load the "
                         f"tokenizer of a model that speaks {name}")  # fmt: skip
    if kind == _CHATML and "<|im_end|>" in tokenizer.get_vocab() and "<|im_start|>" not in tokenizer.get_vocab():
        text = templates.source_of("chatml")  # what begins a turn need not be one token
        return "{{- bos_token }}\n" + text if templates.adds_bos(tokenizer) else text
    place = _FOLDER / f"{kind.built_in}.jinja"
    if not place.is_file():
        return templates.choose(tokenizer, kind.built_in)
    text = place.read_text(encoding="utf-8")
    missing = [token for token in templates.required_tokens(text) if token not in tokenizer.get_vocab()]
    if missing:
        raise ModelError(f"{name} is made of special tokens that this tokenizer lacks: {', '.join(missing)}")
    return text if tokenizer.bos_token else text.replace("{{- bos_token }}\n", "")
