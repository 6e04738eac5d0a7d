"""The JSON of a request, checked by name and read into what the models take."""

from dataclasses import dataclass, field, replace

from common.files import UsageError
from engine.params import SamplingParams

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # names of this machine for itself
ANY_LENGTH = 2**31 - 1  # tokens; the engine ends a text where the context ends
MAX_STOPS, MAX_STOP, MAX_BIAS = 64, 256, 1024  # each step works on every one of them
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# fields that ask for what is not done here, with the values that do not ask for it; null never does
NEUTRAL = {
    **{"tools": [[]], "functions": [[]], "tool_choice": ["none", "auto"], "function_call": ["none", "auto"]},
    **{"modalities": [["text"]], "audio": [], "suffix": [""], "best_of": [1]},
}
KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", list: "a list"}
KINDS[dict] = "an object"


class Refused(Exception):
    """A request that gets an error in OpenAI's shape. param: the field it is about."""

    def __init__(self, status, message, param=None, code=None, headers=None):
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status, self.headers = status, headers
        self.error = {"message": message, "type": kind, "param": param, "code": code}


@dataclass
class Body:
    """The fields of a request. Of a `chat`: `messages`, and the `opening` that the reply continues; of a
    completion: `prompts`, each a text or token ids, and whether to `echo` them."""

    model: str | None
    params: SamplingParams
    n: int
    stream: bool
    chat: bool
    include_usage: bool
    messages: list = field(default_factory=list)
    opening: str = ""
    prompts: list = field(default_factory=list)
    echo: bool = False
    generates: bool = True  # False: only the prompts are scored

    def params_of(self, choice):
        """The params of the n-th choice: the request's seed + n."""
        seed = self.params.seed
        return self.params if seed is None else replace(self.params, seed=(seed + choice) % 2**63)


def get(fields, name, kind, default=None):
    """A field of type `kind`, or the default if it is absent or null."""
    value = fields.get(name)
    if value is None:
        return default
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not kind:
        raise Refused(400, f"{name} has to be {KINDS[kind]}", name)
    return value


def read_chat(fields):
    messages = read_messages(get(fields, "messages", list, []))
    opening = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    limit = get(fields, "max_completion_tokens", int, get(fields, "max_tokens", int, ANY_LENGTH))
    logprobs, top = get(fields, "logprobs", bool, False), get(fields, "top_logprobs", int, 0)
    return read_common(fields, limit, logprobs, top, messages=messages, opening=opening)


def read_completion(fields):
    prompts, echo = read_prompts(fields.get("prompt")), get(fields, "echo", bool, False)
    top, limit = get(fields, "logprobs", int), get(fields, "max_tokens", int, 16)
    generates = limit != 0 or not echo
    options = dict(prompts=prompts, echo=echo, generates=generates)
    return read_common(fields, limit if generates else 1, top is not None, top or 0, **options)


def read_common(fields, max_tokens, logprobs, top_logprobs, **options):
    """The Body with the fields that both kinds of request have, and with options."""
    for name, neutral in NEUTRAL.items():
        if fields.get(name) is not None and fields[name] not in neutral:
            raise Refused(400, f"{name} is not supported here; leave it out", name)
    logprobs = logprobs or top_logprobs > 0
    if not 0 <= top_logprobs <= 20:
        raise Refused(400, "at most 20 log-probabilities of a token can be had", "top_logprobs")
    stop = [fields["stop"]] if isinstance(fields.get("stop"), str) else get(fields, "stop", list, [])
    if len(stop) > MAX_STOPS or not all(isinstance(text, str) and len(text) <= MAX_STOP for text in stop):
        what = f"a text, or a list of at most {MAX_STOPS}, of at most {MAX_STOP} characters each"
        raise Refused(400, f"stop has to be {what}", "stop")
    schema = read_schema(fields)
    if any(stop) and schema is not None:
        raise Refused(400, "stop: JSON of a schema ends by itself; leave stop out", "stop")
    try:
        bias = {int(i): float(bias) for i, bias in get(fields, "logit_bias", dict, {}).items()}
        if len(bias) > MAX_BIAS or not all(abs(value) <= 100 for value in bias.values()):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        what = f"logit_bias has to be at most {MAX_BIAS} token ids with numbers from -100 to 100"
        raise Refused(400, what, "logit_bias") from None
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: value for name in names if (value := get(fields, name, float)) is not None}
    seed = get(fields, "seed", int)
    given |= dict(seed=None if seed == -1 else seed, top_k=max(0, get(fields, "top_k", int, 0)))
    given |= dict(max_tokens=min(max_tokens, ANY_LENGTH), logprobs=logprobs, top_logprobs=top_logprobs)
    given |= dict(stop=tuple(filter(None, stop)), json_schema=schema, logit_bias=bias or None)
    try:
        params = SamplingParams(**given)
    except UsageError as error:
        raise refusal(error) from None
    n = get(fields, "n", int, 1)
    if n < 1:
        raise Refused(400, f"n has to be at least 1, not {n}", "n")
    chat = not options.get("prompts")
    usage = get(get(fields, "stream_options", dict, {}), "include_usage", bool, False)
    stream = get(fields, "stream", bool, False)
    return Body(get(fields, "model", str), params, n, stream, chat, usage, **options)


def refusal(error):
    """What the engine refuses, as 400; the field is named first in its message."""
    message = str(error)
    name = message.split(" ")[0].strip(":,")
    known = name in SamplingParams.__dataclass_fields__
    return Refused(400, message, {"json_schema": "response_format"}.get(name, name) if known else None)


def read_schema(fields):
    """The schema of `response_format`; None for plain text."""
    form = get(fields, "response_format", dict, {})
    if form.get("type", "text") == "text":
        return None
    if form["type"] != "json_schema":
        raise Refused(400, "response_format: type is text, or json_schema with a schema", "response_format")
    schema = get(get(form, "json_schema", dict, {}), "schema", dict)
    if schema is None:
        raise Refused(400, "response_format: json_schema.schema is missing", "response_format")
    return schema


def read_messages(messages):
    """Turns of system, user and assistant: texts of equal roles in a row become one, and what the system says
    later than at the beginning is a user's."""
    turns = []  # (role, list of texts)
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise Refused(400, f"messages[{i}]: a role is one of {', '.join(ROLES)}", "messages")
        role, text = ROLES[role], text_of(message.get("content"), i)
        if role == "system" and turns and (len(turns) > 1 or turns[0][0] != "system"):
            role = "user"
        if not turns or turns[-1][0] != role:
            turns.append((role, []))
        turns[-1][1].append(text)
    if not turns:
        raise Refused(400, "messages has to be a list of at least one message", "messages")
    return [{"role": role, "content": "\n\n".join(texts)} for role, texts in turns]


def text_of(content, i):
    """The text of a message's content: null, a string, or a list of parts, all of them text."""
    content = "" if content is None else content
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise Refused(400, f"messages[{i}]: content is a text, or a list of parts of type text", "messages")
    return "\n".join(texts)


def read_prompts(prompt):
    """A list of texts or lists of token ids."""
    prompts = prompt if isinstance(prompt, list) and not all(type(i) is int for i in prompt) else [prompt]
    for one in prompts:
        if not isinstance(one, str) and not (isinstance(one, list) and all(type(i) is int for i in one)):
            raise Refused(400, "prompt has to be a text, token ids, or a list of either", "prompt")
    return prompts
