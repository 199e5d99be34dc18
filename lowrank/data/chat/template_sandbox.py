"""Chat templates as programs of strangers: transformers' environment for them, with every step and value counted.

What a template can do that costs is counted where it does it: steps of loops, calls, operators that grow (`*`, `+`,
`**`, `%`, `~`), filters and methods of strings, literals of lists, and everything that is written. What it writes is
what `transformers.utils.chat_template_utils.render_jinja_template` writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from lowrank.data.chat.template_budget import BUDGET, LONGEST_TEMPLATE, Budget, TemplateCostsTooMuch, budget
from lowrank.data.chat.template_parts import in_parts, takes_parts
from lowrank.data.chat.template_sizes import before_filter, before_method, before_operator, formatter_for
from lowrank.errors import ModelError
from lowrank.records import THOUGHTS

_STEPS, _CONCAT, _WEIGHED, _WROTE = (f"lowrank_{name}" for name in ("steps", "concat", "weighed", "wrote"))
"""Filters that are put into the compiled template."""
_END_HERE = "LOWRANK_CONTINUES_HERE "
"""Put behind a message that is to be gone on with. The space tells whether the template trims what it writes."""


def render(
    text: str,
    *,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    generation_prompt: bool,
    variables: Mapping[str, Any],
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """What a template writes, and where its `{% generation %}` blocks stand in that.

    Raises TemplateCostsTooMuch, and whatever jinja2 and the template raise.
    """
    size = Size()
    given = {
        "messages": [aliased(plain(each, size)) for each in messages],
        "tools": plain(tools, size),
        "documents": None,
    }
    variables = {name: plain(value, size) for name, value in variables.items()}
    counts = Budget(size.characters, len(messages))
    token = BUDGET.set(counts)
    parts: list[str] = []
    try:
        template = _compiled(text)
        for part in template.generate(**given, add_generation_prompt=generation_prompt, **variables):
            parts.append(part)
            counts.written += len(part)
    except RecursionError as error:
        raise TemplateCostsTooMuch("it calls itself too deep") from error
    except (OverflowError, MemoryError) as error:
        raise TemplateCostsTooMuch(f"it makes values that are too large ({error})") from error
    finally:
        BUDGET.reset(token)
    return "".join(parts), tuple(counts.blocks)


def render_text(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    template: str | None = None,
    generation_prompt: bool = False,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """As `tokenizer.apply_chat_template(messages, tokenize=False)`, with the limits of `render`.

    `continue_final_message`: up to where the last message's content ends. ModelError where the template lets no end of
    that be found.
    """
    text = tokenizer.chat_template if template is None else template
    given = {**tokenizer.special_tokens_map, **(variables or {})}

    def written(turns: list[dict[str, Any]]) -> str:
        return render(text, messages=turns, tools=None, generation_prompt=generation_prompt, variables=given)[0]

    if continue_final_message:
        messages = [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']}{_END_HERE}"}]
    whole = written(in_parts(messages) if takes_parts(written) else messages)
    return _up_to_the_mark(whole) if continue_final_message else whole


def _up_to_the_mark(text: str) -> str:
    place = text.rfind(_END_HERE.strip())
    if place < 0:
        raise ModelError("the chat template does not write the last message, so an answer cannot begin with it")
    return text[:place] if text.startswith(_END_HERE, place) else text[:place].rstrip()


@lru_cache(maxsize=64)
def _compiled(text: str) -> jinja2.Template:
    if len(text) > LONGEST_TEMPLATE:
        raise TemplateCostsTooMuch(f"it has {len(text):,} characters, more than {LONGEST_TEMPLATE:,}")
    return _ENVIRONMENT.from_string(text)


@dataclass
class Size:
    """Characters and entries of what a template is given."""

    characters: int = 0


def plain(value: Any, size: Size) -> Any:
    """Of JSON's types alone, as a copy: no method of anything else may be in a template's reach."""
    if isinstance(value, str):
        size.characters += len(value)
        return str.__str__(value)
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {plain(key, size): plain(item, size) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        size.characters += len(value)
        items = [plain(item, size) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return f"<{type(value).__name__}>"


def aliased(message: dict[str, Any]) -> dict[str, Any]:
    """A thought under every name that templates read, as transformers has it."""
    thought = next((message[name] for name in THOUGHTS if message.get(name) is not None), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


class Counting(NodeTransformer):
    """Puts the counting filters into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """What is iterated over counts its steps."""
        self.generic_visit(node)
        node.iter = _filter(node.iter, _STEPS)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """Joined texts are weighed."""
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _CONCAT)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        """Fixed text that is written is weighed."""
        self.generic_visit(node)
        size = sum(len(each.data) for each in node.nodes if isinstance(each, nodes.TemplateData))
        if size:
            node.nodes.append(_filter(nodes.Const(size, lineno=node.lineno), _WROTE))
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        """Lists that are not constant are weighed."""
        self.generic_visit(node)
        constant = all(isinstance(each, nodes.Const) for each in node.items)
        return node if constant else _filter(node, _WEIGHED)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        """Tuples that are read and not constant are weighed."""
        self.generic_visit(node)
        constant = node.ctx != "load" or all(isinstance(each, nodes.Const) for each in node.items)
        return node if constant else _filter(node, _WEIGHED)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        """Dicts with items are weighed."""
        self.generic_visit(node)
        return _filter(node, _WEIGHED) if node.items else node


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class Steps:
    """An iterable whose steps count."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        counts = budget()
        for item in self._items:
            counts.step()
            yield item

    def __len__(self) -> int:
        return len(self._items)


@pass_context
def _steps(_context: Any, items: Iterable[Any]) -> Steps:
    return Steps(items)


@pass_context
def _concat(context: Any, parts: list[Any]) -> str:
    counts = budget()
    counts.expect(sum(map(counts.weigh, parts)))
    joined = (markup_join if context.eval_ctx.autoescape else str_join)(parts)
    counts.made(joined)
    return joined


@pass_context
def _weighed(_context: Any, value: Any) -> Any:
    counts = budget()
    counts.weigh(value)
    counts.made(value)
    return value


@pass_context
def _wrote(_context: Any, size: int) -> str:
    budget().grew(size)
    return ""


@pass_context
def _finalize(_context: Any, value: Any) -> Any:
    """Everything that is written passes here."""
    counts = budget()
    if isinstance(value, (list, tuple, dict, set)):
        counts.weigh(value)
        value = str(value)
    counts.made(value)
    return value


def _counted_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at what it is given first; it is never computed when the template is compiled."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @pass_context
    def counted(context: Any, *args: Any, **kwargs: Any) -> Any:
        counts = budget()
        args = before_filter(counts, name, args, kwargs)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        result = function(*([first[wanted]] if wanted else ()), *args, **kwargs)
        counts.made(result)
        return result

    return counted


class _Generation(Extension):
    """`{% generation %}`: what stands in it is what an assistant says."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        """As a block that is called with what it would write."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("generated"), [], [], body).set_lineno(line)

    def generated(self, caller: Callable[[], str]) -> str:
        """It stands behind what was written before."""
        text = caller()
        counts = budget()
        counts.blocks.append((counts.written, counts.written + len(text)))
        return text


class TemplateNamespace(Namespace):
    """Without names that begin with `_`."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` is one
        attributes = dict(*args[1:], **kwargs)
        list(map(_checked_name, attributes))
        budget().weigh(attributes)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _checked_name(name)
        super().__setitem__(name, value)


def _checked_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace of a chat template cannot hold {name!r}")


class _Dict:
    """`dict` without its other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """As dict's own."""
        return dict.fromkeys(*args, **kwargs)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class Environment(ImmutableSandboxedEnvironment):
    """Where templates run: jinja2's sandbox, whose operators and calls are held to a budget."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_finalize
        )
        functions: dict[str, Callable[..., Any]] = {**FILTERS, "tojson": _tojson}
        self.filters = {name: _counted_filter(name, function) for name, function in functions.items()}
        self.filters |= {_STEPS: _steps, _CONCAT: _concat, _WEIGHED: _weighed, _WROTE: _wrote}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": TemplateNamespace,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        parsed = super()._parse(source, name, filename)
        counted = self.counting(parsed).visit(parsed)
        counted.set_environment(self)
        return counted

    def counting(self, parsed: nodes.Template) -> Counting:
        """What rewrites a template that was parsed."""
        return Counting()

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        counts = budget()
        before_operator(counts, operator, left, right)
        result = super().call_binop(context, operator, left, right)
        counts.made(result)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        return formatter_for(self, value) if super().wrap_str_format(value) is not None else None

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        counts = budget()
        counts.step()
        if isinstance(obj, LoopContext):
            args = (Steps(args[0]), *args[1:]) if args else args
        else:
            args = before_method(counts, obj, args, kwargs)
        result = super().call(context, obj, *args, **kwargs)
        counts.made(result)
        return result


_ENVIRONMENT = Environment()
