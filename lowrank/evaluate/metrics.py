"""How near answers are to those in the data, by the field's standard tools.

`bleu4` is sacrebleu's corpus BLEU (arXiv:1804.08771), with its `zh` tokenizer where there is Chinese, else `13a`.
`rouge1`, `rouge2`, `rougeL` are the F-measures of rouge-score; of Chinese answers, those of rouge-chinese over
jieba's words. `llamafactory_*` are the numbers LLaMA-Factory reports, for comparison with old reports: BLEU over single
characters whatever the language, and rouge-chinese over jieba's words. All are percentages.

Needs `pip install 'lowrank-llm[metrics]'`, but for `exact_match`.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lowrank.errors import ConfigError

CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True)
class Metric:
    """A number per row that adds up: the metric of any set of rows is `combine` of the sum of their statistics.

    statistics_NK   one line of K numbers for each row
    combine         sums (K), number of rows -> the metric
    """

    statistics_NK: np.ndarray
    combine: Callable[[np.ndarray, int], float]
    signature: str = ""
    """What exactly was computed, in the tool's own words."""

    @property
    def value(self) -> float:
        """Of all rows."""
        return self.combine(self.statistics_NK.sum(0), len(self.statistics_NK))

    def per_row(self) -> np.ndarray:
        """(N) the jackknife's pseudo-values: how far each row moves the metric. Of a mean they are its rows; their mean
        is the metric (of BLEU but for its bias), and their spread tells how sure it is (Efron 1982)."""
        rows, sums_K = len(self.statistics_NK), self.statistics_NK.sum(0)
        if rows < 2:
            return np.full(rows, self.value)
        without = [self.combine(sums_K - own_K, rows - 1) for own_K in self.statistics_NK]
        return rows * self.value - (rows - 1) * np.asarray(without)

    def of(self, rows_N: np.ndarray) -> Metric:
        """Of the rows that `rows_N` (bool) chooses."""
        return replace(self, statistics_NK=self.statistics_NK[rows_N])


NAMES = ("exact_match", "bleu4", "rouge1", "rouge2", "rougeL")
LLAMAFACTORY_NAMES = ("llamafactory_bleu4", "llamafactory_rouge1", "llamafactory_rouge2", "llamafactory_rougeL")


def measure(predictions: Sequence[str], labels: Sequence[str], names: Sequence[str] = NAMES) -> dict[str, Metric]:
    """The metrics of `names`. ConfigError for a name that is not known, or if a package is missing."""
    unknown = [name for name in names if name not in (*NAMES, *LLAMAFACTORY_NAMES)]
    if unknown:
        raise ConfigError(f"no metric {unknown[0]!r}; known: {', '.join((*NAMES, *LLAMAFACTORY_NAMES))}")
    found: dict[str, Metric] = {}
    if "exact_match" in names:
        hits = [float(a.strip() == b.strip()) for a, b in zip(predictions, labels)]
        found["exact_match"] = _mean(hits)
    if "bleu4" in names:
        found["bleu4"] = _bleu4(predictions, labels)
    if any(name.startswith("rouge") for name in names):
        rows = [_rouge(a, b) for a, b in zip(predictions, labels)]
        found |= {name: _mean([row[name] for row in rows]) for name in ("rouge1", "rouge2", "rougeL")}
    if any(name.startswith("llamafactory") for name in names):
        rows = [_llamafactory(a, b) for a, b in zip(predictions, labels)]
        found |= {name: _mean([row[name] for row in rows]) for name in LLAMAFACTORY_NAMES}
    return {name: found[name] for name in names}


def check_installed(names: Sequence[str]) -> None:
    """ConfigError now rather than after the answers if a package is missing."""
    measure(["你好 x"], ["你好 x"], names)


def _mean(values: Sequence[float]) -> Metric:
    return Metric(100.0 * np.asarray(values, float)[:, None], lambda sums, rows: float(sums[0] / rows))


def _bleu4(predictions: Sequence[str], labels: Sequence[str]) -> Metric:
    BLEU = _needed("sacrebleu.metrics").BLEU
    chinese = any(CHINESE.search(label) for label in labels)
    bleu = BLEU(tokenize="zh" if chinese else "13a", effective_order=True)
    scores = [bleu.sentence_score(prediction, [label]) for prediction, label in zip(predictions, labels)]
    statistics_NK = np.asarray([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], float)

    def combine(sums: np.ndarray, rows: int) -> float:
        del rows
        counts, totals = sums[:4].astype(int).tolist(), sums[4:8].astype(int).tolist()
        return BLEU.compute_bleu(counts, totals, int(sums[8]), int(sums[9]), smooth_method="exp").score

    plain = BLEU(tokenize="zh" if chinese else "13a")
    plain.corpus_score(predictions[:1], [labels[:1]])  # it knows its signature once it has seen references
    return Metric(statistics_NK, combine, plain.get_signature().format())


def _rouge(prediction: str, label: str) -> dict[str, float]:
    """F-measures, 0 to 1."""
    if CHINESE.search(label):
        return _chinese_rouge(prediction, label)
    scorer = _needed("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    return {name: score.fmeasure for name, score in scorer.score(label, prediction).items()}


def _chinese_rouge(prediction: str, label: str) -> dict[str, float]:
    predicted, wanted = (" ".join(_rouge_tokens(text)) for text in (prediction, label))
    if not predicted.split() or not wanted.split():
        return dict.fromkeys(("rouge1", "rouge2", "rougeL"), 0.0)
    (scores,) = _needed("rouge_chinese").Rouge().get_scores(predicted, wanted)
    return {name: scores[theirs]["f"] for name, theirs in _THEIRS.items()}


_THEIRS = {"rouge1": "rouge-1", "rouge2": "rouge-2", "rougeL": "rouge-l"}


def _llamafactory(prediction: str, label: str) -> dict[str, float]:
    """Of train/sft/metric.py of LLaMA-Factory 0.9: sentence BLEU over characters, method3 smoothing."""
    translate = _needed("nltk.translate.bleu_score")
    smooth = translate.SmoothingFunction().method3
    bleu = translate.sentence_bleu([list(label)], list(prediction), smoothing_function=smooth) if prediction else 0.0
    rouge = _chinese_rouge(prediction, label)
    return {"llamafactory_bleu4": float(bleu), **{f"llamafactory_{name}": value for name, value in rouge.items()}}


def _rouge_tokens(text: str) -> list[str]:
    jieba = _needed("jieba")
    jieba.setLogLevel(logging.WARNING)
    return list(jieba.cut(text))


def _needed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"these metrics need {name.split('.')[0]}: pip install 'lowrank-llm[metrics]'") from error
