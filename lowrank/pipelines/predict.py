"""Prediction: all models of a run, and the bare base, on questions whose answers are known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank.checkpoints.atomic import write_text
from lowrank.data.config import SourceConfig
from lowrank.evaluate.metrics import LLAMAFACTORY_NAMES, NAMES, check_installed
from lowrank.evaluate.predict import (
    AnsweringModels,
    MetricResult,
    ModelAnswer,
    answer_questions,
    compare,
    score_labels,
    unanswered,
    write_predictions,
)
from lowrank.evaluate.questions import Question, read_questions
from lowrank.generate.request import GenerationConfig
from lowrank.pipelines.inference import BASE_NAME, InferenceModel, open_inference_model, reward_model_notice
from lowrank.report.thumbnails import write_thumbnails

Done = Callable[[int, int], None]
Progress = Callable[[str], AbstractContextManager[Done]]
"""Shows the progress of a stage: `with progress("12 questions") as done: done(3, 12)`."""
LLAMAFACTORY_FILE = "generated_predictions.jsonl"
"""What LLaMA-Factory's `do_predict` writes: `prompt`, `predict`, `label`, with the special tokens of the prompt."""


@dataclass(frozen=True)
class PredictRequest:
    """Settings of a prediction: which models answer which questions, and the metrics of their answers.

    model      a run folder, an adapter folder, or a model
    sources    datasets that training reads; the last answer of each row is the label
    adapters   names of the models that answer; empty: all and the base
    metrics    names of evaluate/metrics.py; empty: all of NAMES
    folder     where predictions.jsonl and metrics.json go
    """

    model: str
    sources: tuple[SourceConfig, ...]
    folder: Path
    adapters: tuple[str, ...] = ()
    metrics: tuple[str, ...] = NAMES
    llamafactory: bool = False
    """Whether LLaMA-Factory's metrics and file of predictions are written, too."""
    perplexity: bool = True
    sampling: GenerationConfig = field(default_factory=GenerationConfig)
    seed: int = 42
    batch_size: int = 64
    chat_template: str | None = None
    base: str | None = None
    last: bool = False
    compile: bool = False
    """Whether to answer through decoder layers compiled by torch."""


def predict(
    request: PredictRequest, progress: Progress, warn: Callable[[Sequence[str]], None]
) -> tuple[dict[str, Any], Mapping[str, Mapping[str, MetricResult]]]:
    """Answer all questions. Returns the contents of metrics.json, and each model's metrics. An interrupted request
    continues where it stopped."""
    names = (*request.metrics, *(LLAMAFACTORY_NAMES if request.llamafactory else ()))
    check_installed(names)
    questions = [
        question
        for source in request.sources
        for question in read_questions(source, seed=request.seed, notify=lambda text: warn([text]))
    ]
    trained = open_inference_model(
        request.model,
        which="last" if request.last else "best",
        chat_template=request.chat_template,
        base=request.base,
        compile=request.compile,
        notify=lambda text: warn([text]),
    )
    chosen = list(request.adapters or trained.slots)
    if reward_models := trained.reward_models_among(chosen):
        warn([reward_model_notice(reward_models)])
    answering = trained.answering(chosen, [each.prompt for each in questions], lambda text: warn([text]))
    request.folder.mkdir(parents=True, exist_ok=True)
    settings = _settings(request, trained, chosen)
    partial = request.folder / f"unfinished-{_key_of_settings(settings)}.jsonl"
    with progress(f"{len(questions)} questions, {len(chosen)} models") as done:
        answers = answer_questions(
            answering, questions, request.sampling, partial, max_rows=request.batch_size, on_done=done
        )
    likelihood, unscored = {}, []
    if request.perplexity:
        with progress("perplexity of the labels") as done:
            likelihood, unscored = score_labels(answering, questions, on_done=done)
    missing = unanswered(answers)
    labels = [question.label.content for question in questions]
    metric_results = compare(answers, labels, names, likelihood, BASE_NAME if BASE_NAME in chosen else None)
    warn([each.describe(len(questions)) for each in missing])
    warn(_left_out(metric_results, len(questions), unscored, list(likelihood)))
    write_predictions(request.folder / "predictions.jsonl", questions, answers)
    write_thumbnails(request.folder, questions)
    if request.llamafactory:
        _write_as_llamafactory(request.folder / LLAMAFACTORY_FILE, answering, questions, answers, chosen)
    result = {
        **settings,
        "rows": len(questions),
        "unanswered": {name: len(each.places) for each in missing for name in each.model_names},
        "metrics": _plain(metric_results),
        "predictions": str(request.folder / "predictions.jsonl"),
    }
    write_text(request.folder / "metrics.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    partial.unlink()
    return result, metric_results


def _settings(request: PredictRequest, trained: InferenceModel, chosen: Sequence[str]) -> dict[str, Any]:
    """Return the settings that the answers depend on."""
    return {
        "model": request.model,
        "data": ",".join(source.path for source in request.sources),
        "last": request.last,
        "sampling": request.sampling.model_dump(mode="json"),
        "chat_template": request.chat_template,
        "models": trained.versions(chosen),
    }


def _write_as_llamafactory(
    path: Path,
    answering: AnsweringModels,
    questions: Sequence[Question],
    answers: Sequence[Mapping[str, ModelAnswer]],
    chosen: Sequence[str],
) -> None:
    """Write the answers of the first model that is not the base in the form of LLaMA-Factory's predictions."""
    name = next((each for each in chosen if each != BASE_NAME), BASE_NAME)
    renderer, tokenizer = answering.renderers[name], answering.base.tokenizer
    lines = []
    for question, by_model in zip(questions, answers):
        if by_model[name].problem is None:
            prompt = tokenizer.decode(renderer.prompt_segment(question.prompt).token_L, skip_special_tokens=False)
            line = {"prompt": prompt, "predict": by_model[name].text, "label": question.label.content}
            lines.append(json.dumps(line, ensure_ascii=False))
    write_text(path, "\n".join(lines) + "\n")


def _left_out(
    metric_results: Mapping[str, Mapping[str, MetricResult]],
    rows: int,
    unscored: Sequence[str],
    answering_models: Sequence[str],
) -> list[str]:
    """Return notices about questions that perplexity leaves out: not scored, or with NaN."""
    reported = []
    if unscored:
        reasons = "; ".join(list(dict.fromkeys(unscored))[:3])
        reported.append(f"perplexity leaves out {len(unscored)} of {rows} questions ({reasons})")
    for model_name in answering_models:
        perplexity = metric_results[model_name].get("perplexity")
        not_finite = rows - len(unscored) - (perplexity.rows if perplexity else 0)
        if not_finite > 0:
            reported.append(
                f"{model_name}: perplexity leaves out {not_finite} questions whose log-probabilities are not finite"
            )
    return reported


def _key_of_settings(settings: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=6).hexdigest()


def _plain(metric_results: Mapping[str, Mapping[str, MetricResult]]) -> dict[str, dict[str, Any]]:
    return {
        model_name: {
            name: {
                "value": result.value.value,
                "rows": result.rows,
                "interval": [result.value.low, result.value.high],
                **({"gain": vars(result.gain)} if result.gain else {}),
                **({"signature": result.signature} if result.signature else {}),
            }
            for name, result in results.items()
        }
        for model_name, results in metric_results.items()
    }
