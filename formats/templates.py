"""Chat templates: programs in Jinja that come with a checkpoint, run in a sandbox. One expression
can take hours or all memory, so all but well-known ones run in a process that has limits."""
from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 10  # that a text may take
MEGABYTES = 1024  # of memory, of which Python has 30
MAX_CHARACTERS = 20_000_000
ONE_LOOP = {  # over the messages: SmolLM2, ChatML twice, Llama 3, Gemma 2, Phi-3.5
    "872be49dbb638044", "153280e3ff55d19d", "58c1a1f04baa7ada", "ba03a121d097859c",
    "ecd6ae513fe103f0", "78d976a442bcde2f"}
# this file alone, as its folder imports torch; Jinja may be where only this process looks
START = "import sys; sys.path += sys.argv[2:]; exec(open(sys.argv[1]).read())"
IDLE: list[subprocess.Popen] = []  # they wait for the next text, and end with this process
os.register_at_fork(after_in_child=IDLE.clear)


def render_template(source: str, **values: Any) -> str:
    """A chat template's text, as transformers renders it, from values that JSON has. Raises what
    the template raises, perhaps as a ValueError, and one where it takes too much."""
    text = source.replace("\\n", "\n")  # either ends a line in Jinja's strings
    if hashlib.sha256(text.encode()).hexdigest()[:16] in ONE_LOOP:
        return compiled(source).render(values)
    request = json.dumps([SECONDS, source, values])
    command = [sys.executable, "-I", "-c", START, __file__, *sys.path]
    process = None
    with suppress(IndexError):  # another thread has it, perhaps
        process = IDLE.pop()
    if process is None or process.poll() is not None:  # which somebody has ended
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True)  # Ctrl-C in a terminal is not for it
    try:
        process.stdin.write(f"{request}\n".encode())
        process.stdin.flush()
        answer = process.stdout.readline()
    except BaseException:  # the answer must not be taken for the next one's
        process.kill()
        raise
    if not answer:
        raise ValueError(f"it takes more than {SECONDS} seconds or {MEGABYTES} MB of memory")
    IDLE.append(process)
    text, error = json.loads(answer)
    if error:
        raise ValueError(error)
    return text


def serve() -> None:
    """What that process does: it renders the request of each line, until it takes too much."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with suppress(OSError, ValueError):  # of a system without such a limit
        resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES << 20, MEGABYTES << 20))
    for request in sys.stdin.buffer:
        seconds, source, values = json.loads(request)
        signal.alarm(seconds)
        try:
            text, error = compiled(source).render(values), ""
            if len(text) > MAX_CHARACTERS:
                raise ValueError(f"it writes more than {MAX_CHARACTERS} characters")
        except MemoryError:
            break
        except Exception as e:
            text, error = "", str(e)[:1000] or repr(e)
        signal.alarm(0)
        print(json.dumps([text, error]), flush=True)


def refuse(message: str) -> None:
    raise ValueError(message)


TEMPLATES = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
TEMPLATES.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's escapes HTML
TEMPLATES.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}


@lru_cache(maxsize=8)
def compiled(source: str) -> Template:
    """{% generation %} marks what an assistant said, for training; its content is written."""
    source = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", source)
    return TEMPLATES.from_string(re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", source))


if __name__ == "__main__":
    serve()
