"""Renders a chat template in Jinja's sandbox as transformers does; run as a script, within bounds.

    {"source": ..., "tokens": {...}, "chats": [[messages, generate], ...]} | python text/sandbox.py

A checkpoint's template is a program that nobody has read, so text/template.py has it run in this process of
its own, which the system ends when it takes too much time or memory. Where a system has no such limit (macOS
has none on memory), the one on time remains, or that of text/template.py.
"""

import contextlib
import datetime
import json
import sys

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS, MEMORY = 2, 2**29  # bytes
LONGEST = 1_000_000  # characters of a rendered chat


class GenerationTag(Extension):
    """transformers' {% generation %} around what an assistant says; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def fail(message):
    raise jinja2.TemplateError(message)


def strftime_now(form):
    """Always the same day, so that a chat has the same ids tomorrow."""
    return datetime.date(2024, 7, 26).strftime(form)


def tojson(value, indent=None, **_):
    return json.dumps(value, ensure_ascii=False, indent=indent)


def reason(error):
    """Why there is no text, in one line. Templates raise anything; too little memory ends the process."""
    if isinstance(error, MemoryError):
        raise error
    return " ".join(str(error).split())[:200] or type(error).__name__


def render_all(source, tokens, chats):
    """[(text, None), or (None, why it has none)] of each (messages, whether to prompt for an answer)."""
    extensions = ["jinja2.ext.loopcontrols", GenerationTag]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {"raise_exception": fail, "strftime_now": strftime_now}
    try:
        template = sandbox.from_string(source)
    except Exception as error:
        return [(None, reason(error)) for _ in chats]
    rendered = []
    for messages, generate in chats:
        variables = {"messages": messages, "add_generation_prompt": generate, "tools": None}
        try:
            text = template.render({**tokens, **variables, "documents": None})
            rendered.append((text, None) if len(text) <= LONGEST else (None, "the text is too long"))
        except Exception as error:
            rendered.append((None, reason(error)))
    return rendered


def limit(name, value):
    """Sets a limit of this process, as far as the system has it; a lower one stays."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        resource.setrlimit(getattr(resource, name), (value, value))


if __name__ == "__main__":
    limit("RLIMIT_CPU", CPU_SECONDS)
    limit("RLIMIT_AS", MEMORY)
    print(json.dumps(render_all(**json.load(sys.stdin))))
