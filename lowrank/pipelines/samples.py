"""Sample answers of a run: a few held-out questions, answered by the base and by every adapter, for report.html."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from lowrank.checkpoints.atomic import write_text
from lowrank.checkpoints.run_folder import CONFIG
from lowrank.config import settings_of_run
from lowrank.errors import DataError
from lowrank.evaluate.predict import answer_questions, unanswered, write_predictions
from lowrank.evaluate.questions import read_questions
from lowrank.generate.request import GenerationConfig
from lowrank.pipelines.inference import open_inference_model
from lowrank.report.thumbnails import write_thumbnails

FOLDER = Path("predict", "samples")


def answer_samples(run: Path, count: int, notify: Callable[[str], None]) -> Path:
    """Answer `count` rows of the run's held-out data, chosen by its seed; return the folder with the answers.

    DataError if the run has no held-out data of its own, or it is not there any more.
    """
    config = settings_of_run(run / CONFIG)
    held_out = next((job.data.eval for job in config.jobs if job.data.eval), None)
    if held_out is None:
        raise DataError(
            f"{run}: no job has held-out data (data.eval) to take questions from; name a file: lowrank predict {run} "
            "--data FILE"
        )
    source = held_out[0].model_copy(update={"max_samples": count})
    questions = read_questions(source, seed=config.seed, notify=notify)
    trained = open_inference_model(str(run), notify=notify)
    answering_models = trained.answering(trained.slots, [each.prompt for each in questions], notify)
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "unfinished.jsonl"
    partial.unlink(missing_ok=True)
    answers = answer_questions(answering_models, questions, GenerationConfig(max_new_tokens=256), partial)
    write_predictions(folder / "predictions.jsonl", questions, answers)
    write_thumbnails(folder, questions)
    silent = {name: len(each.places) for each in unanswered(answers) for name in each.model_names}
    result = {"data": source.path, "rows": len(questions), "unanswered": silent, "metrics": {}}
    write_text(folder / "metrics.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    partial.unlink()
    return folder
