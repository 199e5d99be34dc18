"""The numbers are those of the tools whose name they bear; intervals hold what they promise.

The tools are imported by the tests that ask them: together they take most of a second of every process that collects.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from lowrank.config.schema import EvalMetric
from lowrank.errors import ConfigError
from lowrank.evaluate.bootstrap import difference, interval
from lowrank.evaluate.metrics import LLAMAFACTORY_NAMES, NAMES, measure

ENGLISH = ["The cat sat on the mat today.", "A quick brown fox jumps over it.", "Nothing in common at all."]
PREDICTIONS = ["The cat sat on a mat today.", "A quick brown fox jumped over it", ""]
CHINESE = ["今天天气很好，我们去公园散步吧。", "北京是中国的首都。", "hello 世界"]
GESAGT = ["今天天气不错，我们去公园走走。", "中国的首都是北京。", ""]


def test_bleu_is_sacrebleus() -> None:
    import sacrebleu

    for described, labels, tokenize in ((PREDICTIONS, ENGLISH, "13a"), (GESAGT, CHINESE, "zh")):
        metric = measure(described, labels)["bleu4"]
        expected = sacrebleu.corpus_bleu(described, [labels], tokenize=tokenize).score
        assert metric.value == pytest.approx(expected, abs=1e-9)
        assert 1 < metric.value < 99
        assert f"tok:{tokenize}" in metric.signature


def test_rouge_is_that_of_the_language() -> None:
    import jieba
    from rouge_chinese import Rouge
    from rouge_score.rouge_scorer import RougeScorer

    english = measure(PREDICTIONS, ENGLISH)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        expected = [scorer.score(label, described)[name].fmeasure for described, label in zip(PREDICTIONS, ENGLISH)]
        assert english[name].value == pytest.approx(100 * float(np.mean(expected)))
    chinese = measure(GESAGT, CHINESE)
    for name, theirs in (("rouge1", "rouge-1"), ("rouge2", "rouge-2"), ("rougeL", "rouge-l")):
        expected = [
            Rouge().get_scores(" ".join(jieba.cut(described)), " ".join(jieba.cut(label)))[0][theirs]["f"]
            for described, label in zip(GESAGT[:2], CHINESE)
        ]
        assert chinese[name].value == pytest.approx(100 * sum(expected) / 3)


@pytest.mark.filterwarnings("ignore:.*0 counts.*")
def test_llamafactorys_numbers_are_over_characters() -> None:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    ours = measure(PREDICTIONS, ENGLISH, LLAMAFACTORY_NAMES)
    smooth = SmoothingFunction().method3
    expected = [sentence_bleu([list(b)], list(a), smoothing_function=smooth) for a, b in zip(PREDICTIONS[:2], ENGLISH)]
    assert ours["llamafactory_bleu4"].value == pytest.approx(100 * sum(expected) / 3)
    assert ours["llamafactory_bleu4"].value > measure(PREDICTIONS, ENGLISH)["bleu4"].value + 1


def test_exact_match_and_unknown_names() -> None:
    assert measure(["a ", "b"], ["a", "c"], ["exact_match"])["exact_match"].value == 50.0
    with pytest.raises(ConfigError, match="no metric 'bleu'; known: exact_match, bleu4"):
        measure([], [], ["bleu"])


def test_every_metric_can_decide_which_adapter_is_best() -> None:
    assert get_args(EvalMetric) == ("loss", *NAMES, *LLAMAFACTORY_NAMES)


def test_intervals_hold_what_they_promise() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for trial in range(60):
        hits = generator.random(80) < 0.3
        metric = measure(["x" if hit else "y" for hit in hits], ["x"] * 80, ["exact_match"])["exact_match"]
        found = interval(metric, seed=trial)
        held += found.low <= 30.0 <= found.high
    assert 50 <= held <= 60


def test_pairs_tell_apart_what_lone_intervals_cannot() -> None:
    """Rows differ much, the two adapters differ on every row by a little: paired, that is certain."""
    right = np.linspace(1, 18, 60).astype(int)
    labels = [" ".join(f"w{place}" for place in range(20))] * 60
    worse, better = (
        [" ".join(f"w{place}" if place < number + more else "x" for place in range(20)) for number in right]
        for more in (0, 1)
    )
    one, other = (measure(described, labels)["bleu4"] for described in (better, worse))
    assert interval(other).high > interval(one).low, "each alone they overlap"
    gain = difference(one, other)
    assert gain.value == pytest.approx(one.value - other.value)
    assert gain.low > 0
    assert difference(one, one).low == difference(one, one).high == 0.0
    assert set(NAMES) == set(measure(better, labels))


def test_rows_of_a_metric_have_its_spread() -> None:
    """The jackknife against the bootstrap; of a mean the rows are its own."""
    generator = np.random.default_rng(0)
    vocabulary = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "in", "the", "sun"]
    labels = [" ".join(generator.choice(vocabulary, 12)) for _ in range(120)]
    predictions = [" ".join(token if generator.random() < 0.8 else "x" for token in label.split()) for label in labels]
    found = measure(predictions, labels, ["bleu4", "rouge1"])
    rouge_N = found["rouge1"].per_row()
    assert rouge_N == pytest.approx(found["rouge1"].statistics_NK[:, 0])
    for name in ("bleu4", "rouge1"):
        row_N, drawn = found[name].per_row(), interval(found[name])
        assert row_N.mean() == pytest.approx(found[name].value, abs=0.2)
        assert 1.96 * row_N.std(ddof=1) / np.sqrt(120) == pytest.approx((drawn.high - drawn.low) / 2, rel=0.12)
    assert measure(predictions[:1], labels[:1], ["bleu4"])["bleu4"].per_row().shape == (1,)
