"""What a client asked, as tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank.data.rendering import Renderer
from lowrank.records import Conversation
from lowrank.serve.engine import Question
from lowrank.serve.refusal import Refusal


def tokens_of(question: Question, renderer: Renderer, tokenizer: Any, vocabulary: int) -> np.ndarray:
    """(L) A chat through its template, a text as the tokenizer reads it, tokens as they are.

    Refusal for tokens the model does not have, DataError for a chat that the template refuses.
    """
    if isinstance(question, Conversation):
        return renderer.prompt(question)
    if isinstance(question, str):
        question = np.asarray(tokenizer(question, verbose=False)["input_ids"], np.int64)
    wrong = question[(question < 0) | (question >= vocabulary)]
    if len(wrong):
        raise Refusal(400, f"prompt: the model has {vocabulary} tokens, there is no {wrong[0]}", param="prompt")
    return question
