"""Unsloth's functions around conversations, by the module's name there: templates, ShareGPT's keys, loss on answers."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from lowrank.compat.unsloth.responses import train_on_responses_only as train_on_responses_only
from lowrank.compat.unsloth.sharegpt import standardize_data_formats as standardize_data_formats
from lowrank.compat.unsloth.sharegpt import standardize_sharegpt as standardize_sharegpt
from lowrank.compat.unsloth.sharegpt import to_sharegpt as to_sharegpt
from lowrank.compat.unsloth.template_names import KINDS, text_of
from lowrank.data import templates
from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.errors import ConfigError

_LOG = logging.getLogger(__name__)
_SAME = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}
_IN_ONE_PIECE = """{%- set pieces = namespace(messages=[]) %}
{%- for each in messages %}
    {%- if each.content is string %}
        {%- set pieces.messages = pieces.messages + [each] %}
    {%- else %}
        {%- set text = namespace(all='') %}
        {%- for part in each.content or [] %}{% set text.all = text.all + (part.text or '') %}{% endfor %}
        {%- set pieces.messages = pieces.messages + [dict(each, content=text.all)] %}
    {%- endif %}
{%- endfor %}
{%- set messages = pieces.messages %}
"""
"""Contents in parts, as processors of pictures want them, become text."""


def get_chat_template(
    tokenizer: Any,
    chat_template: str | Sequence[str] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
    **others: Any,
) -> Any:
    """The tokenizer, which from now on writes conversations by a template of Unsloth's names, one of ours, a .jinja
    file, or (Jinja text, what ends a turn; "eos_token" for EOS).

    `mapping`: how the data calls role, content, user and assistant ({"role": "from", "content": "value", "user":
    "human", "assistant": "gpt"}); conversations with the usual keys are read too. `map_eos_token`: EOS becomes what
    ends a turn; where ChatML's <|im_end|> is no token, EOS is renamed to it. `system_message`: written where a
    conversation has none. ConfigError, ModelError: no such template, or the tokenizer lacks its tokens.
    """
    if others.keys() - {"patch_saving", "use_zoo_tokenizer_patch"}:
        raise ConfigError(f"get_chat_template cannot honor {', '.join(others)}; leave it out")
    if isinstance(chat_template, str):
        _give_chatml_tokens(tokenizer, chat_template, map_eos_token)
        text, stop = text_of(tokenizer, chat_template), None
        text = _IN_ONE_PIECE + text if "each.content" not in text and ".content" in text else text
    elif len(chat_template) == 2 and all(isinstance(each, str) for each in chat_template):  # pyright: ignore[reportUnnecessaryIsInstance]
        text, stop = chat_template
    else:
        raise ConfigError(f"chat_template={chat_template!r}: expected a name, or (Jinja text, what ends a turn)")
    text = _read_by(mapping) + _with_system(system_message) + text
    tokenizer.chat_template = text
    if stop is not None and stop != "eos_token" and map_eos_token:
        if stop not in tokenizer.get_vocab():
            _rename(tokenizer, {tokenizer.eos_token: stop})
        tokenizer.eos_token = stop
    elif stop is None and map_eos_token:
        stops = Renderer(tokenizer, DataConfig()).stop_tokens - {tokenizer.eos_token_id}
        if len(stops) == 1:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(next(iter(stops)))
    return tokenizer


def apply_chat_template(
    dataset: Any,
    tokenizer: Any = None,
    chat_template: str = "### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}",
    default_system_message: str | None = None,
    extra_eos_tokens: Sequence[str] | None = None,
) -> Any:
    """The dataset with a column `text`: its conversations by a template written with {INPUT}, {OUTPUT} and, if there is
    a system prompt, {SYSTEM}. The tokenizer writes by it from now on. ConfigError: it has not one of each in that
    order."""
    if extra_eos_tokens:
        raise ConfigError("extra_eos_tokens: write them into chat_template, behind {OUTPUT}")
    tokenizer.chat_template = _from_example(chat_template, default_system_message, tokenizer)

    def written(row: Mapping[str, Any]) -> dict[str, str]:
        return {"text": tokenizer.apply_chat_template(row["conversations"], tokenize=False)}

    return dataset.map(written, desc="apply_chat_template")


def _from_example(example: str, system: str | None, tokenizer: Any) -> str:
    """Jinja text from an example of one or two rounds. What stands before the first round is written once."""
    first = re.fullmatch(r"(.*?)\{INPUT\}(.*?)\{OUTPUT\}(.*)", example.lstrip(), re.DOTALL)
    if first is None:
        raise ConfigError("chat_template: expected {INPUT} and behind it {OUTPUT}, once or twice")
    before, between, after = first.groups()
    end, question = after, ""
    second = re.fullmatch(r"(.*?)\{INPUT\}(.*?)\{OUTPUT\}(.*)", after, re.DOTALL)
    if second is not None:
        if second[2] != between or not second[1].startswith(second[3]):
            raise ConfigError("chat_template: the two rounds differ; write the same round twice")
        end, question = second[3], second[1][len(second[3]) :]
        if not before.endswith(question):
            raise ConfigError("chat_template: the two rounds begin differently; write the same round twice")
    elif not before.endswith(":\n") and "\n\n" not in before:
        question = before
    else:  # one round: what is said once is whatever stands before its last paragraph
        head, gap, last = before.rpartition("\n\n")
        question = (gap + last) if gap else before
        before = head + question
    opening = before[: len(before) - len(question)]
    once, _, rest = opening.partition("{SYSTEM}")
    if "{SYSTEM}" not in opening and system is not None:
        raise ConfigError("default_system_message: chat_template has no place for it, {SYSTEM}")
    if tokenizer.eos_token and not end.endswith(tokenizer.eos_token) and tokenizer.eos_token not in end:
        _LOG.warning("apply_chat_template: EOS is put behind {OUTPUT}, so that answers end")
        end += tokenizer.eos_token
    bos = "{{- bos_token }}" if templates.adds_bos(tokenizer) and not once.startswith(tokenizer.bos_token) else ""
    given = "messages[0].content" if "{SYSTEM}" in opening else "''"
    return (
        f"{bos}{{%- if messages[0].role == 'system' %}}{{%- set system = {given} %}}{{%- set rest = messages[1:] %}}"
        f"{{%- else %}}{{%- set system = {json.dumps(system or '')} %}}{{%- set rest = messages %}}{{%- endif %}}"
        f"{{{{- {json.dumps(once)} + system + {json.dumps(rest)} }}}}"
        f"{{%- for message in rest %}}{{%- if message.role == 'user' %}}"
        f"{{{{- {json.dumps(question)} + message.content + {json.dumps(between)} }}}}"
        f"{{%- else %}}{{%- generation %}}{{{{- message.content + {json.dumps(end)} }}}}{{%- endgeneration %}}"
        f"{{%- endif %}}{{%- endfor %}}"
    )


def _read_by(mapping: Mapping[str, str] | None) -> str:
    """Jinja text that gives conversations of other keys the usual ones."""
    if not mapping or {**_SAME, **mapping} == _SAME:
        return ""
    named = {**_SAME, **mapping}
    role, content = json.dumps(named["role"]), json.dumps(named["content"])
    roles = json.dumps({named["user"]: "user", named["assistant"]: "assistant"})
    return (
        "{%- if 'role' not in messages[0] or 'content' not in messages[0] %}"
        f"{{%- set renamed = namespace(messages=[]) %}}{{%- set roles = {roles} %}}{{%- for each in messages %}}"
        f"{{%- set renamed.messages = renamed.messages + [{{'role': roles.get(each[{role}], each[{role}]), 'content': "
        f"each[{content}]}}] %}}{{%- endfor %}}{{%- set messages = renamed.messages %}}{{%- endif %}}"
    )


def _with_system(message: str | None) -> str:
    if message is None:
        return ""
    own = f"[{{'role': 'system', 'content': {json.dumps(message)}}}]"
    return f"{{%- if messages[0].role != 'system' %}}{{%- set messages = {own} + messages %}}{{%- endif %}}"


def _give_chatml_tokens(tokenizer: Any, name: str, map_eos_token: bool) -> None:
    """ChatML for a tokenizer without its tokens, as Unsloth has it: EOS is renamed <|im_end|>, which needs no new row
    in the embedding; Gemma's own marks of turns are renamed both. <|im_start|> is written in pieces otherwise."""
    if KINDS.get(name) != KINDS["chatml"] or not map_eos_token:
        return
    vocabulary = tokenizer.get_vocab()
    if "<|im_end|>" in vocabulary:
        return
    if "<start_of_turn>" in vocabulary:
        _rename(tokenizer, {"<start_of_turn>": "<|im_start|>", "<end_of_turn>": "<|im_end|>"})
        return
    _LOG.warning("get_chat_template: %s is renamed <|im_end|>, which ends a turn; <|im_start|> is no token of this "
                 "tokenizer and is written in pieces", tokenizer.eos_token)  # fmt: skip
    _rename(tokenizer, {tokenizer.eos_token: "<|im_end|>"})


def _rename(tokenizer: Any, names: Mapping[str, str]) -> None:
    """Tokens by new names, under their ids. ConfigError for a tokenizer that is not of the `tokenizers` library."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError("get_chat_template: tokens can be renamed in fast tokenizers alone; choose another template")
    special = {key: names[value] for key, value in tokenizer.special_tokens_map.items()
               if isinstance(value, str) and value in names}  # fmt: skip
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    for each in described.get("added_tokens", []):
        each["content"] = names.get(each["content"], each["content"])
    model = described["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(key, key): value for key, value in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(key, key), *rest] for key, *rest in model["vocab"]]
    described["post_processor"] = _renamed_in(described.get("post_processor"), names)
    tokenizer._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(described))
    for key, value in special.items():
        setattr(tokenizer, key, value)


def _renamed_in(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(key, key): _renamed_in(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [_renamed_in(each, names) for each in value]
    return names.get(value, value) if isinstance(value, str) else value
