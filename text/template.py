"""Chat templates of other people's checkpoints: recognised as one of our formats, or made into a format
themselves.

A template is a program. It is rendered in Jinja's sandbox with bounds on its length, its loops and the size
of every value, and never sees what is said: contents are placeholders, and the text between them is the
format.
"""

import datetime
import functools
import json
import re
from pathlib import Path

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

from common.files import UsageError
from text.chat import CHAT_FORMATS, ChatFormat, Special, Text, content_of, markers, system_into_user

LONGEST, LONGEST_OF_MESSAGE = 100_000, 100  # characters of a template, or of any value in a rendering
BUDGET, BUDGET_OF_MESSAGE = 3_000_000, 20_000  # characters and steps of a rendering
PLACEHOLDER = "\uf8ff%d\uf8ff"  # private-use characters: neither trimmed nor changed in case
# what Llama 3.1's template says before the system text
PREAMBLE = re.compile(r"Cutting Knowledge Date: [^\n]*\nToday Date: [^\n]*\n\n")
ODD = "  a\n", " <think>b</think> c [INST] {{ d }} ", "\n\tE </s><|im_end|>\n\n", "(f)  ", "\nG"
TRIMMED = [text.strip() for text in ODD]
FILTERS = (
    "abs capitalize count d default dictsort first float int items last length list lower map reject "
    "rejectattr reverse safe select selectattr sort string title trim unique upper"
)
METHODS = (
    "capitalize count endswith find get index items keys lower lstrip rsplit rstrip split splitlines "
    "startswith strip title upper values"
)


# ---- the sandbox -------------------------------------------------------------------------------------------


class GenerationTag(Extension):
    """transformers' {% generation %} around what an assistant says; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


class Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, but never written as text, whose length could be exponential if they are nested."""

    def __repr__(self):
        raise SecurityError("a namespace cannot be written as text")


class Bound(NodeTransformer):
    """Rewrites a template so that each loop is counted, every concatenation passes through `call_binop`, and
    the size of every list, tuple, dict, filtered and compared value is checked."""

    def visit_Filter(self, node):
        self.generic_visit(node)
        return nodes.Filter(node, "limited", [], [], None, None, lineno=node.lineno)

    visit_List = visit_Dict = visit_Filter

    def visit_Tuple(self, node):
        return self.visit_Filter(node) if node.ctx == "load" else node

    def visit_Compare(self, node):
        self.generic_visit(node)
        node.expr = nodes.Filter(node.expr, "limited", [], [], None, None, lineno=node.lineno)
        return node

    visit_Operand = visit_Compare

    def visit_For(self, node):
        self.generic_visit(node)
        if node.recursive:
            raise SecurityError("recursive loops are not supported")
        cost = 1 + sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        cost += sum(len(const.value) for const in node.find_all(nodes.Const) if isinstance(const.value, str))
        node.iter = nodes.Filter(
            node.iter, "counted", [nodes.Const(cost)], [], None, None, lineno=node.lineno
        )
        return node

    def visit_Concat(self, node):
        self.generic_visit(node)
        texts = [nodes.Filter(part, "string", [], [], None, None, lineno=node.lineno) for part in node.nodes]
        return functools.reduce(lambda left, right: nodes.Add(left, right, lineno=node.lineno), texts)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up, with bounds and without what could multiply the size of a value."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self):
        extensions = ["jinja2.ext.loopcontrols", GenerationTag]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self.output)
        self.filters = {name: self.filters[name] for name in FILTERS.split()}
        self.filters |= {"counted": self.counted, "tojson": self.tojson, "join": self.join}
        self.filters["limited"] = self.checked
        self.globals = {"range": self.globals["range"], "dict": dict, "namespace": Namespace}
        self.globals |= {"raise_exception": self.fail, "strftime_now": self.strftime_now}
        self.budget, self.longest = BUDGET, LONGEST

    def spend(self, steps):
        self.budget -= steps
        if self.budget < 0:
            raise SecurityError("it takes too long")

    def limited(self, value):
        """The value, unless it is too large; a value that it holds twice counts twice, as in its text."""
        size, items, inside = 0, 0, [value]
        while inside and size <= self.longest:
            item = inside.pop()
            items += 1
            if isinstance(item, str | list | tuple | dict):
                size += len(item)
            if isinstance(item, dict):
                inside += [*item, *item.values()]
            elif isinstance(item, list | tuple):
                inside += item
        if size > self.longest or (isinstance(value, int) and abs(value) > 2**63):
            raise SecurityError("a value is too large")
        self.spend(items + size // 16)
        return value

    @staticmethod
    @jinja2.pass_context  # so that it is never evaluated at compile time
    def checked(context, value):
        return context.environment.limited(value)

    def output(self, value):
        if isinstance(value, str):
            self.spend(len(value))
        return self.limited(value)

    @staticmethod
    @jinja2.pass_context  # so that it is never evaluated at compile time
    def counted(context, values, cost):
        values = list(context.environment.limited(values))
        context.environment.spend(cost * len(values))
        return values

    @staticmethod
    def tojson(value, indent=None, **options):
        return json.dumps(value, ensure_ascii=False, indent=min(indent, 8) if indent else None)

    def join(self, values, separator=""):
        texts = []
        for value in values:
            texts.append(str(self.limited(value)))
            self.spend(len(texts[-1]) + len(separator))
        return self.limited(separator.join(texts))

    @staticmethod
    def fail(message):
        raise jinja2.TemplateError(message)

    @staticmethod
    def strftime_now(form):
        """Always the same day, so that a chat has the same ids tomorrow."""
        if not re.fullmatch(r"([^%]|%[A-Za-z%]){0,50}", form):
            raise SecurityError(f"date format {form!r} is not supported")
        return datetime.date(2024, 7, 26).strftime(form)

    def call_binop(self, context, operator, left, right):
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or (operator in "*%" and not numbers):
            raise SecurityError(f"{operator!r} is not supported between these values")
        return self.limited(super().call_binop(context, operator, left, right))

    def call(__self, __context, __obj, *args, **kwargs):
        __self.spend(100)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | list | tuple | dict) and __obj.__name__ not in METHODS.split():
            raise SecurityError(f".{__obj.__name__}() is not supported")
        return __self.limited(super().call(__context, __obj, *args, **kwargs))


class Template:
    """A chat template. tokens: its variables bos_token, eos_token and so on."""

    def __init__(self, source, tokens):
        self.source, self.tokens, self.sandbox = source, tokens, Sandbox()
        if len(source) > LONGEST or PLACEHOLDER[0] in source:
            raise ValueError(f"it has more than {LONGEST:,} characters, or U+F8FF")
        self.compiled = self.bounded(
            lambda: self.sandbox.from_string(Bound().visit(self.sandbox.parse(source)))
        )

    def bounded(self, work, number=0):
        """work(), with any error as a ValueError of one line. number: of messages."""
        self.sandbox.budget = BUDGET + BUDGET_OF_MESSAGE * number
        self.sandbox.longest = LONGEST + LONGEST_OF_MESSAGE * number
        try:
            return work()
        except Exception as error:  # a template can raise anything
            raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from None

    def render(self, messages, generate):
        variables = {
            "messages": messages,
            "add_generation_prompt": generate,
            "tools": None,
            "documents": None,
        }
        return self.bounded(lambda: self.compiled.render({**self.tokens, **variables}), len(messages))

    def sections(self, messages, generate):
        """The text before, between and after the contents of messages: one string more than messages."""
        marked = [{"role": m["role"], "content": PLACEHOLDER % i} for i, m in enumerate(messages)]
        parts = re.split(f"{PLACEHOLDER[0]}(\\d+){PLACEHOLDER[0]}", self.render(marked, generate))
        if parts[1::2] != [str(i) for i in range(len(messages))]:
            missing = sorted({m["role"] for i, m in enumerate(messages) if str(i) not in parts[1::2]})
            what = f"leaves out the {missing[0]} text" if missing else "repeats or reorders contents"
            raise ValueError(f"it {what}")
        return parts[::2]


# ---- recognising a template --------------------------------------------------------------------------------


def chat(roles, contents=None):
    """Messages by the first letters of their roles; contents in rotation, else placeholders."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    texts = [contents[i % len(contents)] if contents else PLACEHOLDER % i for i in range(len(roles))]
    return [{"role": names[role], "content": text} for role, text in zip(roles, texts, strict=True)]


@functools.cache
def _own(name):
    return Template(CHAT_FORMATS[name].template, {})


def takes_system(template):
    try:
        template.render(chat("su"), True)
    except ValueError:
        return False
    return True


def agrees(template, name):
    """Whether a template and one of our formats have the same markers in the same order around the contents.

    Left out of the comparison: Llama 3.1's date preamble; spaces, in formats of SentencePiece, which puts
    them in itself; space around contents, which a template may trim; the system text of later turns, where
    there is no system role.
    """
    form, chats = CHAT_FORMATS[name], ["suaua", "suau"]
    if not form.system_role:
        chats = ["su"] * takes_system(template) + ["uaua", "uau"]
    for roles in chats:
        texts = [t.render(chat(roles, TRIMMED), roles[-1] == "u") for t in (template, _own(name))]
        if name == "llama3":
            texts[0] = PREAMBLE.sub("", texts[0])
        if form.stops == ("</s>",):
            texts = [text.replace(" ", "") for text in texts]
        if texts[0] != texts[1]:
            return False
    return True


def recognise(template, specials):
    """(name, reason) of the format of ours that a template is; None if it is none of them."""
    odd = chat("suaua", ODD), False
    for name, form in CHAT_FORMATS.items():
        try:
            if markers(form) <= specials.keys() and agrees(template, name):
                if takes_system(template) and template.render(*odd) == _own(name).render(*odd):
                    return name, "gives the same text"
                return name, "has its markers in its order (a preamble, spaces or the system text may differ)"
        except ValueError:  # one of them cannot express the conversation
            continue


# ---- a template as a format --------------------------------------------------------------------------------


def template_format(template, specials):
    """The ChatFormat that a template describes. ValueError says what in it cannot be kept to.

    Under loss are an assistant's content and what follows it up to the special token that ends the turn.
    """
    system_role = takes_system(template)
    for roles in ("suaua", "suau") if system_role else ("uaua", "uau"):
        sections = template.sections(chat(roles), roles[-1] == "u")
        odd = chat(roles, ODD)
        contents = [*(message["content"] for message in odd), ""]
        expected = "".join(section + text for section, text in zip(sections, contents, strict=True))
        if template.render(odd, roles[-1] == "u") != expected:
            raise ValueError("it trims, changes or reads what is said")
        if roles[-1] == "a":
            first, last = sections[0], sections[-1].lstrip()
    names = sorted(filter(None, specials), key=len, reverse=True)
    split = re.compile("(" + "|".join(map(re.escape, names)) + ")")
    end, bos = next((name for name in names if last.startswith(name)), None), template.tokens.get("bos_token")
    if end is None:
        raise ValueError("it ends an assistant's turn with no special token")

    def segments(messages, generate):
        messages = messages if system_role else system_into_user(messages)
        for i, section in enumerate(template.sections(messages, generate)):
            if i:
                yield content_of(messages[i - 1])
            parts = [part for part in split.split(section) if part]
            spoken = i > 0 and messages[i - 1]["role"] == "assistant" and section.lstrip().startswith(end)
            until = parts.index(end) if spoken else -1
            for n, part in enumerate(parts):
                yield (Special if part in specials else Text)(part, n <= until)

    bos = bos if bos in specials and first.startswith(bos) else None
    return ChatFormat(segments, template.source, (end,), bos, system_role, True, template.tokens)


def choose(source, where, tokens, specials, chat_format=None):
    """(name, ChatFormat, reason) for a chat template; chat_format "template" asks for the template itself.

    source: Jinja. where: what it was read from, for messages. tokens: its variables. specials: name -> id.
    """
    try:
        template = Template(source, tokens)
        if chat_format is None and (known := recognise(template, specials)):
            name, why = known
            return name, CHAT_FORMATS[name], f"{name}: the chat template in {Path(where).name} {why}"
        form = template_format(template, specials)
    except ValueError as error:
        known = ", ".join(CHAT_FORMATS)
        raise UsageError(
            f"{where}: this chat template cannot be used ({error}); give --chat-format, one of {known}"
        ) from None
    why = f"the chat template in {Path(where).name} is used as it is; it is none of {', '.join(CHAT_FORMATS)}"
    return "template", form, f"template: {why}"
