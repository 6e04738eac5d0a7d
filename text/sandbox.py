"""Renders a chat template in Jinja's sandbox as transformers does; run as a script, within bounds.

    {"source": ..., "tokens": {...}, "chats": [[messages, generate], ...]} | python text/sandbox.py

A checkpoint's template is a program that nobody has read, so text/template.py has it run in this process of
its own, which the system ends when it takes too much time or memory.
"""

import datetime
import json
import resource
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


def render_all(source, tokens, chats):
    """[(text, None), or (None, why it has none)] of each (messages, whether to prompt for an answer)."""
    extensions = ["jinja2.ext.loopcontrols", GenerationTag]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {"raise_exception": fail, "strftime_now": strftime_now}
    rendered = []
    for messages, generate in chats:
        variables = {"messages": messages, "add_generation_prompt": generate, "tools": None}
        try:
            text = sandbox.from_string(source).render({**tokens, **variables, "documents": None})
            rendered.append((text, None) if len(text) <= LONGEST else (None, "the text is too long"))
        except MemoryError:
            raise
        except Exception as error:  # a template can raise anything
            rendered.append((None, " ".join(str(error).split())[:200] or type(error).__name__))
    return rendered


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print(json.dumps(render_all(**json.load(sys.stdin))))
