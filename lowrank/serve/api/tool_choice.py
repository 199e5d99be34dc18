"""Which tools an answer may call, and whether it must: OpenAI's `tool_choice`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.serve.api.http_errors import ApiError


@dataclass(frozen=True)
class ToolChoice:
    """`shown` to the model, `callable` by it; `forced`: it must call one."""

    shown: list[dict[str, Any]]
    callable: list[dict[str, Any]]
    forced: bool = False


def read_tool_choice(tools: Sequence[dict[str, Any]], given: Any) -> ToolChoice:
    """`auto`, `none`, `required`, a named function, or `allowed_tools`, in the forms of chat and of responses."""
    every = list(tools)
    if given in (None, "auto"):
        return ToolChoice(every, every)
    if given == "none":
        return ToolChoice([], [])
    if not every:
        raise _refused("without tools there is nothing to call")
    if given in ("required", "any"):
        return ToolChoice(every, every, forced=True)
    if not isinstance(given, Mapping):
        raise _refused(f"{str(given)[:80]!r} is none of auto, none, required or a function")
    if given.get("type") == "allowed_tools":
        allowed = given.get("allowed_tools", given)
        wanted = [_name_in(each) for each in allowed.get("tools", ())]
        chosen = [tool for name in wanted for tool in _named(every, name)]
        return ToolChoice(chosen, chosen, forced=allowed.get("mode") == "required")
    return ToolChoice(every, _named(every, _name_in(given)), forced=True)


def name_of(tool: Mapping[str, Any]) -> str:
    """Of a function, in either form."""
    return str(tool.get("function", tool).get("name"))


def _named(tools: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    found = [tool for tool in tools if name_of(tool) == name]
    if not found:
        raise _refused(f"there is no function {name[:80]!r} among the tools")
    return found


def _name_in(given: Any) -> str:
    if not isinstance(given, Mapping) or given.get("type", "function") != "function":
        raise _refused(f"expected a function, got {str(given)[:80]}")
    function = given.get("function", given)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _refused('expected {"type": "function", "function": {"name": ...}}')
    return function["name"]


def _refused(why: str) -> ApiError:
    return ApiError(400, f"unsupported option: tool_choice: {why}", param="tool_choice")
