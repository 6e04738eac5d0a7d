"""The JSON of requests to OpenAI-compatible servers, of their refusals and of their answers."""

import json
import re

from common.files import UsageError
from engine.params import SamplingParams
from llm.reply import Reply, split_reasoning

LONGEST_TEXT = 2**15  # characters

# what may be left out of a request or renamed
CHANGEABLE = ("response_format", "top_k", "min_p", "repetition_penalty", "presence_penalty",
              "frequency_penalty", "logit_bias", "top_p", "stop",
              "random_seed", "seed", "temperature", "max_completion_tokens", "max_tokens")  # fmt: skip
NEW_NAMES = {"max_tokens": "max_completion_tokens", "seed": "random_seed"}

# how servers word a refusal and a prompt that is too long
_REFUSED = (
    r"support|recogni[sz]ed|unknown|unexpected|permitted|allowed|invalid|extra|deprecated|must|should|both"
    r"|expected|range|between|at (?:most|least)|m(?:ax|in)imum|\btoo\b|greater|less|available|compatible|[<>]"
)
_TOO_LONG = r"(?:maximum|exceeds?|model's)(?: \w+){0,2} context[ _]?(?:length|window|size)|prompt is too long"


def request_body(model, messages, params):
    """The JSON of a request: temperature, max_tokens, and what else differs from the servers' default.

    UsageError names what a server cannot be asked for.
    """
    for name in ("choices", "stop_ids", "logprobs", "top_logprobs"):
        if getattr(params, name):
            raise UsageError(f"{name}: an endpoint cannot do this; leave it out or use a local model")
    defaults = vars(SamplingParams()) | {"temperature": None, "max_tokens": None}  # these two are always sent
    sent = {name: value for name, value in vars(params).items() if value != defaults[name]}
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    body = {"model": model, "messages": messages}
    body |= {name: value for name, value in sent.items() if name in CHANGEABLE}
    if params.json_schema is not None:
        schema = {"name": "answer", "schema": params.json_schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


# ---- parameters that a server refuses -------------------------------------------------------------------


def changed(body, changes):
    """A body after {parameter: its new name, or None where it is left out}, in order."""
    body = dict(body)
    for name, new_name in changes.items():
        if name in body:
            value = body.pop(name)
            if new_name:
                body[new_name] = value
    return body


def change_for(body, words):
    """(parameter, its new name, or None to leave it out) for a body that was refused in these words.

    None where no change can help. A parameter that is out of range is left out, too: then the server's own
    value holds.
    """

    def place(name):
        found = re.search(rf"(?<!\w){name}(?!\w)", words)
        return found.start() if found else -1

    named = [name for name in CHANGEABLE if name in body and place(name) >= 0]
    too_long, refused = (re.search(pattern, words, re.IGNORECASE) for pattern in (_TOO_LONG, _REFUSED))
    if not named or too_long or not refused:
        return None
    name = min(named, key=place)
    new_name = NEW_NAMES.get(name)
    return name, new_name if name == "max_tokens" or (new_name and place(new_name) >= 0) else None


def describe(name, new_name):
    """A change in words."""
    return f"{name} is sent as {new_name}" if new_name else f"{name} is left out"


# ---- answers -----------------------------------------------------------------------------------------


def read_error(status, answer, text):
    """(status, the server's words, the parameter they are about) of an answer; (200, "", "") if all is well.

    answer: its JSON, or None. An error under status 200 gets the status that its code or type says.
    """
    answer = answer if isinstance(answer, dict) else {}
    choice = next(iter(answer["choices"]), None) if isinstance(answer.get("choices"), list) else None
    error = answer.get("error") or (choice.get("error") if isinstance(choice, dict) else None)
    error = error or (answer if answer.get("object") == "error" or status != 200 else None)
    if error is None:
        return 200, "", ""
    error = error if isinstance(error, dict) else {"message": error}
    if status == 200:
        code = str(error.get("code"))
        kind = f"{code} {error.get('type')}"
        known = 429 if "rate_limit" in kind else 400 if re.search("invalid|unsupported", kind) else 500
        status = int(code) if re.fullmatch("[45][0-9][0-9]", code) else known
    metadata = error.get("metadata")  # of a router: the words of the server behind it
    details = [error.get("detail"), metadata.get("raw") if isinstance(metadata, dict) else None]
    words = [error.get("message"), *(d if isinstance(d, str) else json.dumps(d) for d in details if d)]
    return status, " ".join(map(str, filter(None, words))) or text, str(error.get("param") or "")


def read_reply(answer):
    """The Reply in the JSON of an answer; ValueError if it is no chat completion."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if choices == []:
        raise ValueError("an answer without choices, no chat completion")
    try:
        message, finish_reason = choices[0]["message"], str(choices[0].get("finish_reason") or "stop")
        parts = _parts(message.get("content"))
        parts += [("reasoning", message.get(name)) for name in ("reasoning_content", "reasoning")]
        parts += [("refusal", message.get("refusal"))]
        parts = [(kind, part) for kind, part in parts if isinstance(part, str) and part]
        if not parts and "content" not in message:
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError("an answer that is no chat completion") from None
    text = "".join(part for kind, part in parts if kind.endswith("text"))
    reasoning, text = split_reasoning(text[: 4 * LONGEST_TEXT])
    beside = dict.fromkeys(part for kind, part in parts if kind in ("reasoning", "thinking"))
    reasoning, error = "\n".join(filter(None, [reasoning, *beside])), None
    if refusal := " ".join(part for kind, part in parts if kind == "refusal"):
        error = f"the model refused: {refusal}"
    elif finish_reason == "content_filter" and not text.strip():
        error = "the content filter withheld the answer"
    if error:
        text, finish_reason = "", "error"
    counts = _counts(answer.get("usage"))
    return Reply(_clean(text), finish_reason, *counts, error=error, reasoning=_clean(reasoning))


def _parts(content):
    """[(kind, text)] of a message's content: null, a string, or a list of parts (or lists)."""
    if content is None or isinstance(content, str):
        return [("text", content)]
    if not isinstance(content, list):
        raise ValueError
    pairs = []
    for part in content:
        kind = part["type"]
        pairs += [(kind, text) for _, text in _parts(part.get(kind) or part.get("text"))]
    return pairs


def _clean(text):
    """Of bounded length, and without halves of surrogate pairs."""
    return text[:LONGEST_TEXT].encode("utf-8", errors="replace").decode()


def _counts(usage):
    """Prompt, completion and cached tokens; 0 for what is no count."""
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens"), cached
    return [count if type(count) is int and count >= 0 else 0 for count in counts]
