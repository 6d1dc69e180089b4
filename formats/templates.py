"""Chat templates: programs in Jinja that come with a checkpoint, run in a sandbox."""
import json
import sys
import time
from collections.abc import Callable
from itertools import count
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
    ValueError where it runs or writes for too long."""
    template = TEMPLATES.from_string(source)
    steps = count(1)  # lines, not time, so that it ends at the same place on every machine

    def trace(frame: FrameType, event: str, argument: Any) -> Callable | None:
        if frame.f_code.co_filename != "<template>":
            return None
        if next(steps) > MAX_STEPS:
            raise ValueError(f"it runs for more than {MAX_STEPS} steps")
        return trace

    pieces = []  # adding to a text would copy it for each
    n_characters = 0
    tracer = sys.gettrace()
    sys.settrace(trace)
    try:
        for piece in template.generate(**values):
            pieces.append(piece)
            n_characters += len(piece)
            if n_characters > MAX_CHARACTERS:
                raise ValueError(f"it writes more than {MAX_CHARACTERS} characters")
    finally:
        sys.settrace(tracer)
    return "".join(pieces)


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
        times, size = (len(x) if hasattr(x, "__len__") else x for x in (left, right))
        if isinstance(times * size, int) and abs(times * size) > MAX_CHARACTERS:
            raise ValueError(f"it asks for more than {MAX_CHARACTERS} characters at once")
        return super().call_binop(context, operator, left, right)


def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """In place of Jinja's own, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def refuse(message: str) -> None:
    raise ValueError(message)


TEMPLATES = Sandbox(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
TEMPLATES.filters["tojson"] = to_json
TEMPLATES.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
