"""What the pages say, in English and in Chinese."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from lowrank.board.sentences import in_chinese
from lowrank.board.wording import FILTERS

LANGUAGES = {"en": "English", "zh": "中文"}
_FOLDER = Path(__file__).parent
_TRANSLATIONS = _FOLDER / "translations"


@dataclass(frozen=True)
class TranslatedText:
    """A text, and whether it is in the language of the page."""

    text: str
    own: bool


class Texts:
    """The texts of one language: `texts("start.title", number=3)`. An unknown key is a mistake of ours."""

    def __init__(self, language: str) -> None:
        self.language = language if language in LANGUAGES else "en"
        self._messages = _read(self.language)

    def __call__(self, key: str, /, **values: Any) -> str:
        """The text of a key with `{name}` filled in."""
        text = self._messages[key]
        return text.format(**values) if values else text

    def __contains__(self, key: str) -> bool:
        return key in self._messages

    def for_scripts(self) -> dict[str, str]:
        """What the scripts of the pages say: the keys below `js.`, without it."""
        return {key[3:]: text for key, text in self._messages.items() if key.startswith("js.")}

    def setting(self, description: str) -> str:
        """The help text of a setting; `description` is the English one of the schema."""
        return description if self.language == "en" else settings_in_chinese().get(description, description)

    def sentence(self, english: object) -> TranslatedText:
        """What a command, a run or the board itself said, in the page's language where it is known (sentences.py)."""
        text = str(english)
        chinese = in_chinese(text) if self.language == "zh" else None
        return TranslatedText(text, own=self.language == "en") if chinese is None else TranslatedText(chinese, own=True)

    def reply(self, english: object) -> str:
        """The same as one text: what is not in the page's language is announced as the output of a command."""
        translated = self.sentence(english)
        return translated.text if translated.own else self("output.of", text=translated.text)

    def verdict(self, verdict: dict[str, Any]) -> TranslatedText:
        """What a curve says (report/verdict.py), from a summary that may be of another version or of anybody's."""
        english = TranslatedText(str(verdict.get("sentence", "")), own=self.language == "en")
        if english.own:
            return english
        sentences = []
        try:
            for part in verdict.get("parts") or ():
                known = {str(name): str(value)[:40] for name, value in part.items()}
                sentences.append(verdicts_in_chinese()[part["part"]].format(**known))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            return english
        return TranslatedText("".join(sentences), own=True) if sentences else english

    @property
    def environment(self) -> jinja2.Environment:
        """The templates."""
        return _environment()

    @staticmethod
    def for_header(accepted: str) -> Texts:
        """The first language of an Accept-Language header that we have."""
        for part in accepted.split(","):
            language = part.split(";")[0].strip().lower()[:2]
            if language in LANGUAGES:
                return Texts(language)
        return Texts("en")


@cache
def settings_in_chinese() -> dict[str, str]:
    """`{English description: Chinese one}`."""
    return json.loads((_TRANSLATIONS / "settings.zh.json").read_text(encoding="utf-8"))


@cache
def verdicts_in_chinese() -> dict[str, str]:
    """By the key of a part (report/verdict.py: PARTS)."""
    return json.loads((_TRANSLATIONS / "verdicts.zh.json").read_text(encoding="utf-8"))


@cache
def _read(language: str) -> dict[str, str]:
    return json.loads((_TRANSLATIONS / f"{language}.json").read_text(encoding="utf-8"))


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER / "pages"),
        autoescape=True,  # names of files and jobs, rows and answers are text and never markup
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,  # a summary of another version may lack anything
    )
    environment.filters |= FILTERS
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # the order of adapters is that of their colors
    return environment
