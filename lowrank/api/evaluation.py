"""`lowrank.evaluate`: adapters and their base on questions with known answers, as `lowrank predict` does it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lowrank.api.inference import Model, load
from lowrank.api.keywords import known_keywords
from lowrank.api.settings import one_source
from lowrank.data.config import SourceConfig
from lowrank.data.sources.memory import RowsLike
from lowrank.errors import ConfigError
from lowrank.evaluate.metrics import check_installed
from lowrank.evaluate.predict import answer_questions, compare, score_labels, unanswered
from lowrank.evaluate.questions import read_questions
from lowrank.generate.request import GenerationConfig
from lowrank.notices import log_notice
from lowrank.pipelines.inference import BASE_NAME
from lowrank.third_party import code_allowed, objects_given

if TYPE_CHECKING:
    import pandas


@known_keywords
def evaluate(
    model: Model | str | Path,
    data: RowsLike | str | SourceConfig,
    *,
    adapters: Sequence[str] = (),
    metrics: Sequence[str] = ("exact_match",),
    perplexity: bool = True,
    max_samples: int | None = None,
    max_new_tokens: int = 512,
    seed: int = 42,
    notify: Callable[[str], None] = log_notice,
    allow_code: bool = False,
) -> pandas.DataFrame:
    """How well the adapters of `model` answer the questions in `data`, and how much better than their base.

    model      a loaded one, or a path as `lowrank.load` takes
    data       rows or a path, as `lowrank.train` takes them
    adapters   who is asked, `base` among them; left out: all, and the base
    metrics    exact_match, and with `lowrank-llm[metrics]` bleu4, rouge1, rouge2, rougeL; higher is better, percent
    perplexity also the perplexity of the answers in the data; lower is better
    max_samples        questions at the most, drawn by `seed`, which sampling takes too
    max_new_tokens     tokens of an answer at the most
    notify             receives what a person should know; left out: the logger `lowrank`
    allow_code         the model's own code, or an adapter's, may run

    A row for each adapter and metric, which are the index (`frame.loc["r8", "exact_match"]`), with numbers: `value`,
    its 95 % bootstrap interval `low`, `high` over the rows, `gain` over the base with `gain_low`, `gain_high` (value
    less the base's: better above 0, of perplexity below 0; NaN where there is no base to compare with), and the number
    of `rows` it is of. Raises DataError, ModelError, ConfigError.
    """
    import pandas

    check_installed(metrics)
    objects: dict[str, Any] = {}
    source = one_source(data, "evaluate", objects)
    source = source if max_samples is None else source.model_copy(update={"max_samples": max_samples})
    with code_allowed(allow_code), objects_given(objects):
        questions = read_questions(source, seed=seed, notify=notify)
        loaded = (model if isinstance(model, Model) else load(model, notify=notify)).inference
    chosen = ([adapters] if isinstance(adapters, str) else list(adapters)) or loaded.names
    models = loaded.answering(chosen, [each.prompt for each in questions], notify)
    with tempfile.TemporaryDirectory(prefix="lowrank-") as folder:
        sampling = GenerationConfig(max_new_tokens=max_new_tokens, seed=seed)
        answers = answer_questions(models, questions, sampling, Path(folder) / "answers.jsonl")
    likelihood, unscored = score_labels(models, questions) if perplexity else ({}, [])
    for each in unanswered(answers):
        notify(each.describe(len(questions)))
    if unscored:
        notify(f"perplexity leaves out {len(unscored)} of {len(questions)} questions: {unscored[0]}")
    labels = [question.label.content for question in questions]
    verdicts = compare(answers, labels, tuple(metrics), likelihood, BASE_NAME if BASE_NAME in chosen else None)
    rows = [
        {
            "adapter": name,
            "metric": metric,
            **vars(verdict.value),
            "gain": verdict.gain.value if verdict.gain else math.nan,
            "gain_low": verdict.gain.low if verdict.gain else math.nan,
            "gain_high": verdict.gain.high if verdict.gain else math.nan,
            "rows": verdict.rows,
        }
        for name, own in verdicts.items()
        for metric, verdict in own.items()
    ]
    if not rows:
        raise ConfigError("evaluate: there is nothing to measure; name metrics, or leave perplexity on")
    return cast(Any, pandas.DataFrame(rows).set_index(["adapter", "metric"]))
