"""What of a LLaMA-Factory file says how a run goes: how long, what is measured, saved and reported when."""

from __future__ import annotations

from typing import Any

from lowrank.compat.llamafactory import method
from lowrank.compat.llamafactory.devices import spread
from lowrank.compat.llamafactory.keys import Keys
from lowrank.report.reporters.trackers import known_trackers
from lowrank.third_party import names_code

METRICS = {
    f"{prefix}{theirs}": ours
    for theirs, ours in {
        "loss": "loss",
        "bleu-4": "llamafactory_bleu4",
        "rouge-1": "llamafactory_rouge1",
        "rouge-2": "llamafactory_rouge2",
        "rouge-l": "llamafactory_rougeL",
    }.items()
    for prefix in ("", "eval_")
}
"""`metric_for_best_model` -> `eval_metric`."""


def run_settings(keys: Keys, problems: list[str], warnings: list[str]) -> dict[str, Any]:
    """Settings of the whole run, in native form. Adds what cannot be honored to `problems`, and what has no effect to
    `warnings`."""
    run: dict[str, Any] = {
        **method.tuning(keys),
        "seed": keys.seed,
        "output_dir": keys.output_dir,
        "micro_batch_tokens": min(4096, keys.per_device_train_batch_size * keys.cutoff_len),
    }
    _, devices, _ = spread(1)
    if devices != 1:
        run["devices"] = devices
    if keys.save_strategy not in ("no", "best"):
        run["save_total_limit"] = keys.save_total_limit
    run |= {"max_steps": keys.max_steps} if keys.max_steps > 0 else {"num_train_epochs": keys.num_train_epochs}
    if keys.neftune_noise_alpha:
        run["neftune_noise_alpha"] = keys.neftune_noise_alpha
    metric = METRICS.get(keys.metric_for_best_model, "loss")
    if metric != "loss":
        run |= {"eval_metric": metric, "eval_generate_samples": None, "eval_max_new_tokens": keys.max_new_tokens}
    if keys.early_stopping_steps:
        run["early_stopping_patience"] = keys.early_stopping_steps
    return run | _intervals(keys, problems, warnings) | _folder(keys, problems) | _reporters(keys, problems)


def _intervals(keys: Keys, problems: list[str], warnings: list[str]) -> dict[str, Any]:
    logging = _interval("logging", keys.logging_strategy, keys.logging_steps, keys, problems)
    strategy = keys.eval_strategy if keys.eval_strategy != "no" else keys.evaluation_strategy
    if strategy == "no" and keys.eval_steps is not None:
        warnings.append("eval_steps has no effect while eval_strategy is 'no'; set eval_strategy: steps")
    held_out = bool(keys.eval_dataset) or keys.val_size > 0
    if strategy != "no" and not held_out:
        problems.append(f"eval_strategy: {strategy!r} needs held-out rows; set eval_dataset or val_size")
    saving = "no" if keys.save_strategy == "best" else keys.save_strategy
    evaluation = _interval("eval", strategy, keys.eval_steps or keys.logging_steps, keys, problems)
    intervals = {"save_steps": _interval("save", saving, keys.save_steps, keys, problems)}
    if held_out:
        intervals["eval_steps"] = evaluation
    return intervals if logging is None else intervals | {"logging_steps": logging}


def _interval(what: str, strategy: str, steps: float, keys: Keys, problems: list[str]) -> float | None:
    """A strategy and its steps as a native interval. An epoch is a share of the epochs there are."""
    if strategy == "no":
        return None
    if strategy == "epoch":
        if keys.max_steps > 0:
            problems.append(f"{what}_strategy: 'epoch' is not supported together with max_steps; set it to steps")
            return None
        # a run of one epoch or less has its only epoch's end at the end of the run
        return 1 / keys.num_train_epochs if keys.num_train_epochs > 1 else None
    if steps >= 1 and steps != int(steps):
        problems.append(f"{what}_steps: expected a whole number, or a share below 1, got {steps:g}")
    return int(steps) if steps >= 1 else steps


def _folder(keys: Keys, problems: list[str]) -> dict[str, Any]:
    checkpoint = keys.resume_from_checkpoint
    if isinstance(checkpoint, str):
        problems.append(
            f"resume_from_checkpoint: {checkpoint!r} may be another program's checkpoint; set it to true to go on from "
            "the last checkpoint in output_dir, or give the adapter as adapter_name_or_path"
        )
    if checkpoint:
        return {"resume": True}
    return {"overwrite": True} if keys.overwrite_output_dir else {"resume": checkpoint is None}


def _reporters(keys: Keys, problems: list[str]) -> dict[str, Any]:
    known = known_trackers()
    names = [name for name in keys.report_to if name != "none"]
    if keys.use_swanlab and "swanlab" not in names:
        names.append("swanlab")
    problems += [
        f"report_to: {name!r} is not supported; choose from {', '.join(known)}, none, or your own my_module:MyReporter"
        for name in names
        if name not in known and not names_code(name)
    ]
    return {"report_to": names} if names else {}
