"""The JSON of a request, checked by name and read into what the models take."""

from dataclasses import dataclass, field, replace

from common.files import UsageError
from engine.params import SamplingParams

ANY_LENGTH = 2**31 - 1  # tokens; the engine ends a text where the context ends
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
class Asked:
    """What a request asks for. Of a `chat`: `messages`, and the `opening` that the reply goes on from; of a
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
        """The params of the n-th choice: a seed of its own, fixed by the request's."""
        seed = self.params.seed
        return self.params if seed is None else replace(self.params, seed=(seed + choice) % 2**63)


def take(body, name, kind, default=None):
    """A field of type `kind`, or the default if it is absent or null."""
    value = body.get(name)
    if value is None:
        return default
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not kind:
        raise Refused(400, f"{name} has to be {KINDS[kind]}", name)
    return value


def read_chat(body):
    messages = read_messages(take(body, "messages", list, []))
    opening = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    limit = take(body, "max_completion_tokens", int, take(body, "max_tokens", int, ANY_LENGTH))
    logprobs, top = take(body, "logprobs", bool, False), take(body, "top_logprobs", int, 0)
    return read_common(body, limit, logprobs, top, messages=messages, opening=opening)


def read_completion(body):
    prompts, echo = read_prompts(body.get("prompt")), take(body, "echo", bool, False)
    top, limit = take(body, "logprobs", int), take(body, "max_tokens", int, 16)
    generates = limit != 0 or not echo
    options = dict(prompts=prompts, echo=echo, generates=generates)
    return read_common(body, limit if generates else 1, top is not None, top or 0, **options)


def read_common(body, max_tokens, logprobs, top_logprobs, **options):
    """An Asked of the fields that both kinds of request have, and of options."""
    for name, neutral in NEUTRAL.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise Refused(400, f"{name} is not supported here; leave it out", name)
    logprobs = logprobs or top_logprobs > 0
    if not 0 <= top_logprobs <= 20:
        raise Refused(400, "at most 20 log-probabilities of a token can be had", "top_logprobs")
    stop = [body["stop"]] if isinstance(body.get("stop"), str) else take(body, "stop", list, [])
    if not all(isinstance(text, str) for text in stop) or len(stop) > 64:
        raise Refused(400, "stop has to be a text or a list of at most 64", "stop")
    try:
        bias = {int(i): float(bias) for i, bias in take(body, "logit_bias", dict, {}).items()}
        if not all(abs(value) <= 100 for value in bias.values()):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        what = "logit_bias has to be token ids with numbers from -100 to 100"
        raise Refused(400, what, "logit_bias") from None
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: value for name in names if (value := take(body, name, float)) is not None}
    given |= dict(seed=take(body, "seed", int), top_k=max(0, take(body, "top_k", int, 0)))
    given |= dict(max_tokens=min(max_tokens, ANY_LENGTH), logprobs=logprobs, top_logprobs=top_logprobs)
    given |= dict(stop=tuple(filter(None, stop)), json_schema=read_schema(body), logit_bias=bias or None)
    try:
        params = SamplingParams(**given)
    except UsageError as error:
        raise refusal(error) from None
    n = take(body, "n", int, 1)
    if n < 1:
        raise Refused(400, f"n has to be at least 1, not {n}", "n")
    chat = not options.get("prompts")
    usage = take(take(body, "stream_options", dict, {}), "include_usage", bool, False)
    stream = take(body, "stream", bool, False)
    return Asked(take(body, "model", str), params, n, stream, chat, usage, **options)


def refusal(error):
    """What the engine refuses, as 400; the field is named first in its message."""
    message = str(error)
    name = message.split(" ")[0].strip(":,")
    known = name in SamplingParams.__dataclass_fields__
    return Refused(400, message, {"json_schema": "response_format"}.get(name, name) if known else None)


def read_schema(body):
    """The schema of `response_format`; None for plain text."""
    form = take(body, "response_format", dict, {})
    if form.get("type", "text") == "text":
        return None
    if form["type"] != "json_schema":
        raise Refused(400, "response_format: type is text, or json_schema with a schema", "response_format")
    schema = take(take(form, "json_schema", dict, {}), "schema", dict)
    if schema is None:
        raise Refused(400, "response_format: json_schema.schema is missing", "response_format")
    return schema


def read_messages(messages):
    """Turns of system, user and assistant: texts of equal roles in a row become one, and what the system says
    later than at the beginning is a user's."""
    turns = []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise Refused(400, f"messages[{i}]: a role is one of {', '.join(ROLES)}", "messages")
        role, text = ROLES[role], text_of(message.get("content"), i)
        if role == "system" and turns and (len(turns) > 1 or turns[0]["role"] != "system"):
            role = "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + text
        else:
            turns.append({"role": role, "content": text})
    if not turns:
        raise Refused(400, "messages has to be a list of at least one message", "messages")
    return turns


def text_of(content, i):
    """The text of a message's content: null, a string, or a list of parts, all of them text."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
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
