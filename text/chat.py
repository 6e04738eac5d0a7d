"""Chat formats: generators of segments, which the tokenizer encodes one by one.

Text is always encoded apart from the markers around it, so nothing that a user or a model writes becomes a
special token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Special:
    """A segment that is one special token."""

    name: str
    loss: bool = False


@dataclass
class Text:
    """A segment of text, encoded by itself, or `ids` if a model sampled it."""

    text: str
    loss: bool = False
    ids: list | None = None


@dataclass
class ChatFormat:
    """segments(messages, add_generation_prompt) yields Special and Text, or raises ValueError for messages
    that it cannot express. template: the same in Jinja. stops: names of the tokens that end a turn, first the
    one that is written. bos: the token that begins a text. system_role: False if the system text opens the
    first user turn. continues: whether a Text directly after another continues it (else SentencePiece puts a
    space between them). tokens: values of the template's variables, such as eos_token."""

    segments: Callable
    template: str
    stops: tuple
    bos: str | None = None
    system_role: bool = True
    continues: bool = False
    tokens: dict = field(default_factory=dict)


def content_of(message):
    return Text(message["content"], message["role"] == "assistant", message.get("ids"))


def llama3(messages, generate):
    yield Special("<|begin_of_text|>")
    for message in [*messages, *([{"role": "assistant"}] if generate else [])]:
        yield from (
            Special("<|start_header_id|>"),
            Text(message["role"]),
            Special("<|end_header_id|>"),
            Text("\n\n"),
        )
        if "content" in message:
            yield from (content_of(message), Special("<|eot_id|>", message["role"] == "assistant"))


def chatml(messages, generate):
    """Qwen 2: nothing begins a text; the newline after an end of turn is not under loss."""
    for message in messages:
        yield from (Special("<|im_start|>"), Text(message["role"] + "\n"), content_of(message))
        yield from (Special("<|im_end|>", message["role"] == "assistant"), Text("\n"))
    if generate:
        yield from (Special("<|im_start|>"), Text("assistant\n"))


def stage(messages, generate):
    yield Special("<s>")
    for message in messages:
        yield from (Special(f"<|{message['role']}|>"), content_of(message))
        yield Special("<|end|>", message["role"] == "assistant")
    if generate:
        yield Special("<|assistant|>")


def mistral(messages, generate, marker=Text):
    """v0.1 and Mixtral: the markers are plain text, and there is no system role."""
    yield Special("<s>")
    for message in system_into_user(messages):
        if message["role"] == "user":
            yield from (marker("[INST]"), Text(message["content"]), marker("[/INST]"))
        else:
            yield from (content_of(message), Special("</s>", True))


def mistral_v3(messages, generate):
    """v0.3: the markers are special tokens. Mistral's template moves the system text to the last user turn;
    here it stays in the first, so that a chat only grows at its end, which prefix caching and training
    need."""
    return mistral(messages, generate, Special)


def vicuna(messages, generate):
    """Vicuna 1.5: the system text comes first, turns are labelled in plain text."""
    yield Special("<s>")
    for message in messages:
        if message["role"] == "system":
            yield Text(message["content"])
        elif message["role"] == "user":
            yield from (Text("USER:"), Text(message["content"]))
        else:
            yield from (Text("ASSISTANT:"), content_of(message), Special("</s>", True))
    if generate:
        yield Text("ASSISTANT:")


def system_into_user(messages):
    """For formats without a system role: its text, a blank line, then the first user turn. ValueError if none
    follows."""
    roles = [message["role"] for message in messages]
    if "system" not in roles:
        return messages
    if roles[:2] != ["system", "user"] or "system" in roles[1:]:
        raise ValueError(
            f"this chat format takes a system text only before a first user turn, not {', '.join(roles)}"
        )
    system, user, *others = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *others]


def markers(form):
    """The names of the special tokens that a format writes."""
    turns = [{"role": role, "content": ""} for role in ("system", "user", "assistant")]
    return {segment.name for segment in form.segments(turns, True) if isinstance(segment, Special)}


_EACH = "{%- for m in messages %}"


def _prompt(text):
    """Jinja: the end of the loop over messages, then the generation prompt."""
    return "{%- endfor %}{%- if add_generation_prompt %}{{ '" + text + "' }}{%- endif %}"


_MISTRAL = (
    "{%- set ns = namespace(system='') %}{%- set turns = messages %}{%- if messages[0]['role'] == 'system' %}"
    "{%- set ns.system = messages[0]['content'] + '\\n\\n' %}{%- set turns = messages[1:] %}{%- endif %}"
    "<s>{%- for m in turns %}{%- if m['role'] == 'user' %}"
    "{{ '[INST] ' + ns.system + m['content'] + ' [/INST]' }}{%- set ns.system = '' %}"
    "{%- else %}{{ ' ' + m['content'] + '</s>' }}{%- endif %}{%- endfor %}"
)

CHAT_FORMATS = {
    "llama3": ChatFormat(
        llama3,
        "<|begin_of_text|>" + _EACH
        + "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] + '<|eot_id|>' }}"
        + _prompt("<|start_header_id|>assistant<|end_header_id|>\\n\\n"),
        ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        "<|begin_of_text|>",
    ),
    "chatml": ChatFormat(
        chatml,
        _EACH + "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
        + _prompt("<|im_start|>assistant\\n"),
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "stage": ChatFormat(
        stage,
        "<s>" + _EACH + "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}" + _prompt("<|assistant|>"),
        ("<|end|>", "</s>"),
        "<s>",
    ),
    "mistral-v3": ChatFormat(
        mistral_v3,
        _MISTRAL.replace("[INST] ", "[INST]").replace(" [/INST]", "[/INST]").replace("' ' + ", ""),
        ("</s>",),
        "<s>",
        system_role=False,
    ),
    "mistral": ChatFormat(mistral, _MISTRAL, ("</s>",), "<s>", system_role=False),
    "vicuna": ChatFormat(
        vicuna,
        "<s>" + _EACH + "{%- if m['role'] == 'system' %}{{ m['content'] + ' ' }}"
        "{%- elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
        "{%- else %}{{ 'ASSISTANT: ' + m['content'] + '</s>' }}{%- endif %}"
        + _prompt("ASSISTANT:"),
        ("</s>",),
        "<s>",
    ),
}  # fmt: skip
