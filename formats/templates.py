"""Chat templates: programs in Jinja that come with a checkpoint, run in a sandbox."""
import json
import sys
from collections.abc import Callable
from datetime import datetime
from types import FrameType
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_STEPS = 1_000_000  # lines that a template may run through
MAX_CHARACTERS = 20_000_000  # of what it writes, or repeats at once


def render_template(source: str, **values: Any) -> str:
    """A chat template's text, as transformers renders it. Raises what the template raises, and
    ValueError where it runs too long or writes too much."""
    template = TEMPLATES.from_string(source)
    tracer = sys.gettrace()
    sys.settrace(step_counter())
    try:
        pieces = []
        n_characters = 0
        for piece in template.generate(**values):
            n_characters += len(piece)
            if n_characters > MAX_CHARACTERS:
                raise ValueError(f"it writes more than {MAX_CHARACTERS} characters")
            pieces.append(piece)
        return "".join(pieces)
    finally:
        sys.settrace(tracer)


def step_counter() -> Callable:
    """A function for sys.settrace that ends a template which loops or recurses for ever. Counting
    lines, not time, it ends the same template at the same place on every machine."""
    n_steps = 0

    def count(frame: FrameType, event: str, argument: Any) -> Callable | None:
        nonlocal n_steps
        if frame.f_code.co_filename != "<template>":
            return None
        n_steps += 1
        if n_steps > MAX_STEPS:
            raise ValueError(f"it runs for more than {MAX_STEPS} steps")
        return count

    return count


class Generation(Extension):
    """{% generation %} marks what an assistant said, for training; its content is written."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """Refuses products and powers that would take all memory or time at once."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise ValueError("it asks for a power")
        sizes = [x if isinstance(x, int) else len(x) for x in (left, right)
                 if isinstance(x, (int, str, list, tuple))]
        if len(sizes) == 2 and abs(sizes[0] * sizes[1]) > MAX_CHARACTERS:
            raise ValueError(f"it asks for more than {MAX_CHARACTERS} characters at once")
        return super().call_binop(context, operator, left, right)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:
    """In place of Jinja's own, which escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
        sort_keys=sort_keys)


def refuse(message: str) -> None:
    raise ValueError(message)


def now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


TEMPLATES = Sandbox(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
TEMPLATES.filters["tojson"] = to_json
TEMPLATES.globals["raise_exception"] = refuse
TEMPLATES.globals["strftime_now"] = now
