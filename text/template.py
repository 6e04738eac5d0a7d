"""Chat templates of other people's checkpoints: recognised as one of our formats, or made into a format
themselves.

A template is rendered for a few conversations (text/sandbox.py), and never again. What it writes between two
messages must depend on their roles alone; these texts are the format, and nothing that is said later is ever
given to the template.
"""

import functools
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

from common.files import UsageError
from text import sandbox
from text.chat import CHAT_FORMATS, ChatFormat, Special, Text, content_of, markers, system_into_user

LONGEST = 100_000  # characters of a template
SECONDS = 60  # for the process that renders it, which may use sandbox.CPU_SECONDS of the processor
PLACEHOLDER = "\uf8ff%d\uf8ff"  # private-use characters: neither trimmed nor changed in case
# what Llama 3.1's template says before the system text
PREAMBLE = re.compile(r"Cutting Knowledge Date: [^\n]*\nToday Date: [^\n]*\n\n")

# the conversations that are rendered, by their roles' first letters; a template must be able to express those
# with a system text (or, if it takes none, those without), and may refuse the others
ROLES = {"s": "system", "u": "user", "a": "assistant"}
WITH_SYSTEM, WITHOUT_SYSTEM = ("suaua", "suau"), ("uaua", "uau")
OTHERS = ("su", "suuaaua", "saua", "auaua", "suasua")
ODD = ["  a\n", " <think>b</think> c [INST] {{ d }} ", "\n\tE </s><|im_end|>\n\n", "(f)  ", "\nG", "", "h"]
CONTENTS = {"odd": ODD, "trimmed": [text.strip() for text in ODD]}
CONTENTS["marked"] = [PLACEHOLDER % i for i in range(len(ODD))]
CHATS = list(itertools.product((*WITH_SYSTEM, *WITHOUT_SYSTEM, *OTHERS), (False, True), CONTENTS))
GENERATE, END = "the prompt for an answer", "the end"  # what follows the last message


def chats_to_render():
    """CHATS as (messages, whether to prompt for an answer)."""
    for roles, generate, contents in CHATS:
        pairs = zip(roles, CONTENTS[contents], strict=False)
        yield [{"role": ROLES[role], "content": text} for role, text in pairs], generate


class Renderings:
    """What a template makes of CHATS; `rendered[roles, generate, contents]` is a text, or raises the
    ValueError that says why there is none."""

    def __init__(self, rendered):
        self.rendered = dict(zip(CHATS, rendered, strict=True))

    def __getitem__(self, chat):
        text, error = self.rendered[chat]
        if error is not None:
            raise ValueError(error)
        return text

    def has(self, roles, generate):
        return self.rendered[roles, generate, "marked"][1] is None


def render(source, tokens):
    """The Renderings of a template, made in a process of its own. ValueError if it cannot be rendered."""
    if len(source) > LONGEST or PLACEHOLDER[0] in source:
        raise ValueError(f"it has more than {LONGEST:,} characters, or U+F8FF")
    request = json.dumps({"source": source, "tokens": tokens, "chats": [*chats_to_render()]})
    try:
        command = [sys.executable, "-P", sandbox.__file__]
        run = subprocess.run(command, input=request, capture_output=True, text=True, timeout=SECONDS)
        run.check_returncode()
    except subprocess.SubprocessError:
        raise ValueError("it takes too long or too much memory") from None
    return Renderings(json.loads(run.stdout))


@functools.cache
def _own(name):
    return Renderings(sandbox.render_all(CHAT_FORMATS[name].template, {}, chats_to_render()))


# ---- recognising a template --------------------------------------------------------------------------------


def agrees(rendered, name):
    """Whether a template and one of our formats have the same markers in the same order around the contents.

    Left out of the comparison: Llama 3.1's date preamble; spaces, in formats of SentencePiece, which puts
    them in itself; space around contents, which a template may trim; the system text of later turns, where
    there is no system role.
    """
    form, chats = CHAT_FORMATS[name], WITH_SYSTEM
    if not form.system_role:
        chats = ("su",) * rendered.has("su", True) + WITHOUT_SYSTEM
    for roles in chats:
        chat = roles, roles[-1] == "u", "trimmed"
        texts = [rendered[chat], _own(name)[chat]]
        if name == "llama3":
            texts[0] = PREAMBLE.sub("", texts[0])
        if form.stops == ("</s>",):
            texts = [text.replace(" ", "") for text in texts]
        if texts[0] != texts[1]:
            return False
    return True


def recognise(rendered, specials):
    """(name, reason) of the format of ours that a template is; None if it is none of them."""
    odd = "suaua", False, "odd"
    for name, form in CHAT_FORMATS.items():
        try:
            if markers(form) <= specials.keys() and agrees(rendered, name):
                if rendered.has("su", True) and rendered[odd] == _own(name)[odd]:
                    return name, "gives the same text"
                return name, "has its markers in its order (a preamble, spaces or the system text may differ)"
        except ValueError:  # one of them cannot express the conversation
            continue


# ---- a template as a format --------------------------------------------------------------------------------


def split(text, roles):
    """The text before, between and after the marked contents of a rendering: one string more than roles."""
    parts = re.split(f"{PLACEHOLDER[0]}(\\d+){PLACEHOLDER[0]}", text)
    if parts[1::2] != [str(i) for i in range(len(roles))]:
        missing = sorted({ROLES[role] for i, role in enumerate(roles) if str(i) not in parts[1::2]})
        what = f"leaves out the {missing[0]} text" if missing else "repeats or reorders contents"
        raise ValueError(f"it {what}")
    return parts[::2]


def read_sections(rendered, system_role):
    """{(role or None, what follows it): the text between them}. ValueError says why a template has none.

    What follows is a role, GENERATE or END.
    """
    sections, required = {}, WITH_SYSTEM if system_role else WITHOUT_SYSTEM
    for roles in (*required, *WITH_SYSTEM, *WITHOUT_SYSTEM, *OTHERS):
        for generate in (False, True):
            must = roles in required and generate == (roles[-1] == "u")
            try:
                texts = split(rendered[roles, generate, "marked"], roles)
            except ValueError:
                if must:
                    raise
                continue  # a conversation that it refuses, or does not write down as a whole
            names = [None, *(ROLES[role] for role in roles), GENERATE if generate else END]
            for pair, text in zip(itertools.pairwise(names), texts, strict=True):
                if sections.setdefault(pair, text) != text:
                    raise ValueError("what it writes between two messages depends on the others")
            odd = "".join(map("".join, zip(texts, [*ODD[: len(roles)], ""], strict=True)))
            if must and rendered[roles, generate, "odd"] != odd:
                raise ValueError("it trims, changes or reads what is said")
    return sections


def template_format(source, tokens, rendered, specials):
    """The ChatFormat that a template describes. ValueError says what in it cannot be kept to.

    Under loss are an assistant's content and what follows it up to the special token that ends the turn.
    """
    system_role = rendered.has("su", True)
    sections = read_sections(rendered, system_role)
    first = sections[None, "system" if system_role else "user"]
    last = sections["assistant", END].lstrip()
    names = sorted(filter(None, specials), key=len, reverse=True)
    end, bos = next((name for name in names if last.startswith(name)), None), tokens.get("bos_token")
    if end is None:
        raise ValueError("it ends an assistant's turn with no special token")

    def segments_of(role, text):
        parts = [part for part in re.split(f"({'|'.join(map(re.escape, names))})", text) if part]
        spoken = role == "assistant" and text.lstrip().startswith(end)
        until = parts.index(end) if spoken else -1
        return [(Special if p in specials else Text)(p, n <= until) for n, p in enumerate(parts)]

    between = {pair: segments_of(pair[0], text) for pair, text in sections.items()}

    def segments(messages, generate):
        messages = messages if system_role else system_into_user(messages)
        roles = [None, *(message["role"] for message in messages), GENERATE if generate else END]
        for i, (role, following) in enumerate(itertools.pairwise(roles)):
            if i:
                yield content_of(messages[i - 1])
            if (role, following) not in between:
                raise ValueError(f"this chat format has no {following} after {role or 'its beginning'}")
            yield from between[role, following]

    bos = bos if bos in specials and first.startswith(bos) else None
    return ChatFormat(segments, source, (end,), bos, system_role, True, tokens)


def choose(source, where, tokens, specials, chat_format=None):
    """(name, ChatFormat, reason) for a chat template; chat_format "template" asks for the template itself.

    source: Jinja. where: what it was read from, for messages. tokens: its variables. specials: name -> id.
    """
    try:
        rendered = render(source, tokens)
        if chat_format is None and (known := recognise(rendered, specials)):
            name, why = known
            return name, CHAT_FORMATS[name], f"{name}: the chat template in {Path(where).name} {why}"
        form = template_format(source, tokens, rendered, specials)
    except ValueError as error:
        known = ", ".join(CHAT_FORMATS)
        raise UsageError(
            f"{where}: this chat template cannot be used ({error}); give --chat-format, one of {known}"
        ) from None
    why = f"the chat template in {Path(where).name} is used as it is; it is none of {', '.join(CHAT_FORMATS)}"
    return "template", form, f"template: {why}"
