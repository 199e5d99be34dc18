"""Tokenizers as notebooks know them: `apply_chat_template` gives token ids, unless `return_dict=True` is said.

transformers 5 gives a dict of `input_ids` and `attention_mask` instead. Notebooks ask for its length, put it into a
column and hand it to `generate`; the length of a dict would be a silent 2.
"""

from __future__ import annotations

import functools
from typing import Any


class IdsFirst:
    """`apply_chat_template` of one tokenizer, with the default of transformers 4."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        functools.update_wrapper(self, type(tokenizer).apply_chat_template)

    def __call__(self, *args: Any, **given: Any) -> Any:
        """As in transformers."""
        given.setdefault("return_dict", bool(given.get("return_assistant_tokens_mask")))
        return type(self.tokenizer).apply_chat_template(self.tokenizer, *args, **given)


def ids_first(tokenizer: Any) -> Any:
    """The same tokenizer, whose `apply_chat_template` gives ids."""
    if hasattr(type(tokenizer), "apply_chat_template"):
        tokenizer.apply_chat_template = IdsFirst(tokenizer)
    return tokenizer
