"""Every text in both languages."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import lowrank.board
from lowrank.board import form
from lowrank.board.job_lines import STATES as JOB_STATES
from lowrank.board.main_settings import EXPORTS, GROUPS, PRESETS, SEARCH
from lowrank.board.sweep_form import WAYS
from lowrank.board.tasks import STATES
from lowrank.board.texts import LANGUAGES, Texts, TranslatedText, settings_in_chinese, verdicts_in_chinese
from lowrank.cli.main import EXIT_CODES
from lowrank.report.verdict import PARTS, verdict

ROOT = Path(lowrank.board.__file__).parent
TEXTS = {
    language: json.loads((ROOT / "translations" / f"{language}.json").read_text("utf-8")) for language in LANGUAGES
}
HAN = re.compile(r"[\u4e00-\u9fff]")
SAME = {
    "target.gguf", "target.ollama", "target.compressed_tensors", "field.adapter.alpha", "field.adapter.dropout",
    "try.top_p", "export.kl", "js.colon", "target.merged_4bit",
}  # fmt: skip
"""Names that are the same in Chinese."""


def descriptions() -> list[str]:
    """Every help text of the schema, each once."""
    found: dict[str, None] = {}

    def look(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("description"), str):
                found[form.tidy(value["description"])] = None
            for item in value.values():
                look(item)
        elif isinstance(value, list):
            for item in value:
                look(item)

    look(form.schema())
    return list(found)


def used() -> set[str]:
    """Keys that pages and scripts ask for by name."""
    keys: set[str] = set()
    for page in (ROOT / "pages").glob("*.html"):
        keys |= set(re.findall(r"""\bt\(["']([^"']+)["'][,)]""", page.read_text("utf-8")))
    for script in (ROOT / "static").glob("*.js"):
        keys |= {f"js.{key}" for key in re.findall(r"""\bt\("([^"]+)"[,)]""", script.read_text("utf-8"))}
    return keys


def test_the_languages_have_the_same_keys_and_places() -> None:
    assert list(TEXTS["en"]) == list(TEXTS["zh"])
    for key, text in TEXTS["en"].items():
        assert set(re.findall(r"\{(\w+)\}", text)) == set(re.findall(r"\{(\w+)\}", TEXTS["zh"][key])), key


def test_what_pages_ask_for_is_there() -> None:
    assert used() <= set(TEXTS["en"])
    composed = {f"state.{state}" for state in STATES} | {f"group.{name}" for name in GROUPS}
    composed |= {f"preset.{name}{part}" for name in PRESETS for part in ("", ".what")}
    composed |= {f"field.{path}" for paths in GROUPS.values() for path in paths}
    composed |= {f"target.{name}{part}" for name, _ in EXPORTS for part in ("", ".what", ".cost")}
    composed |= {f"type.{name}" for _, types in EXPORTS for name in types}
    composed |= {f"field.{path}" for path in SEARCH}
    composed |= {f"js.sweep.way.{way}{part}" for way in WAYS for part in ("", ".hint")}
    composed |= {f"job_state.{state}" for state in JOB_STATES}
    composed |= {f"sweep.search.{search}" for search in form.fields()["sweep.search"].choices}
    assert composed <= set(TEXTS["en"])


def test_nothing_is_kept_that_nobody_asks_for() -> None:
    composed = (
        "state.",
        "group.",
        "preset.",
        "field.",
        "hint.",
        "choice.",
        "target.",
        "type.",
        "kind.",
        "verdict.",
        "exit.",
        "js.plan.part.",
        "job_state.",
        "js.sweep.way.",
        "js.base.",
        "sweep.search.",
        "metric.",
    )
    assert not {key for key in TEXTS["en"] if not key.startswith(composed)} - used()


def test_chinese_is_chinese() -> None:
    assert not {key for key, text in TEXTS["zh"].items() if not HAN.search(text)} - SAME
    assert not [key for key, text in TEXTS["en"].items() if HAN.search(text)]
    for text in [*TEXTS["zh"].values(), *settings_in_chinese().values()]:
        assert not re.search(r"[\u4e00-\u9fff][,;?!](?![a-zA-Z0-9])", text), f"Western punctuation: {text}"


def test_verdicts_are_said_in_both_languages() -> None:
    chinese = verdicts_in_chinese()
    assert chinese.keys() == PARTS.keys()
    for part, text in PARTS.items():
        assert set(re.findall(r"\{(\w+)\}", text)) == set(re.findall(r"\{(\w+)\}", chinese[part])), part
    steps = list(range(1, 61))
    curves = [
        ([5 * 0.9**step for step in steps], []),
        ([2.0] * 60, [(step, 2.0 - step / 50) for step in (10, 20, 30)]),
        ([1.0] * 60, [(step, 1.0 + (step - 30) ** 2 / 1000) for step in (10, 20, 30, 40, 50, 60)]),
        ([1.0] * 40 + [float("nan")] * 20, []),
        ([1.0] * 3, []),
    ]
    for losses, evals in curves:
        found = verdict(steps[: len(losses)], losses, evals)
        kept = json.loads(json.dumps(asdict(found)))  # as it comes out of summary.json
        assert Texts("en").verdict(kept) == TranslatedText(found.sentence, own=True)
        translated = Texts("zh").verdict(kept)
        assert translated.own
        assert HAN.search(translated.text)
        assert sorted(re.findall(r"\d[\d.]*\d|\d", translated.text)) == sorted(
            re.findall(r"\d[\d.]*\d|\d", found.sentence)
        )


@pytest.mark.parametrize(
    "parts", [None, 3, [3], [{"part": "flat_train"}], [{"part": "x"}], [{"part": []}], "abc", [{}]]
)
def test_a_summary_of_anybody_breaks_no_page(parts: Any) -> None:
    assert Texts("zh").verdict({"sentence": "Flat.", "parts": parts}) == TranslatedText("Flat.", own=False)


def test_every_exit_code_is_explained() -> None:
    assert {f"exit.{code}" for code in EXIT_CODES if code not in (0, 130)} <= set(TEXTS["zh"])


def test_every_description_of_a_setting_is_there() -> None:
    """A missing one: add it to lowrank/board/translations/settings.zh.json."""
    known, wanted = settings_in_chinese(), descriptions()
    assert not [text for text in wanted if text not in known]
    assert not set(known) - set(wanted), "of settings that are no more"
    for text, chinese in known.items():
        assert HAN.search(chinese), text


def test_every_field_has_its_help_in_chinese() -> None:
    chinese = Texts("zh")
    for path, field in form.fields().items():
        assert not field.help or HAN.search(chinese.setting(field.help)), path


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en-US,en", "en"),
        ("de,zh-TW;q=0.5", "zh"),
        ("de", "en"),
        ("", "en"),
        (";;,,", "en"),
    ],
)
def test_the_browser_says_which(header: str, language: str) -> None:
    assert Texts.for_header(header).language == language
