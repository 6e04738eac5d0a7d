"""The JSON of replies: heads, choices, pieces of a stream, log-probabilities and usage."""

import json
import time
import uuid

NAMES = {True: ("chatcmpl", "chat.completion"), False: ("cmpl", "text_completion")}


def dumps(value):
    """JSON in ASCII, so that no character is torn and half a surrogate pair stays writable."""
    return json.dumps(value, separators=(",", ":"))


def event(value):
    return f"data: {value if isinstance(value, str) else dumps(value)}\n\n"


def head(body, model):
    """What a response, or every chunk of a streamed one, begins with. llm/endpoint.py recognises this server
    by the fingerprint, so replies of an endpoint behind it do not have one."""
    prefix, kind = NAMES[body.chat]
    fingerprint = f"coser {model.identity}" if model.local else None
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind + ".chunk" * (body.chat and body.stream),
            "created": int(time.time()), "model": body.model, "system_fingerprint": fingerprint}  # fmt: skip


def choice(chat, index, text, logprobs=None, finish_reason=None, reasoning=""):
    """A whole choice."""
    if not chat:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
    message = {"role": "assistant", "content": text, "refusal": None}
    message |= {"reasoning_content": reasoning} if reasoning else {}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}


def piece(chat, index, delta, logprobs=None, finish_reason=None):
    """A choice of a streamed chunk; delta: {} or what it adds to the message."""
    if not chat:
        return choice(False, index, delta.get("content", ""), logprobs, finish_reason)
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def usage(body, choices):
    """The tokens of finished choices; a prompt that several share counts once."""
    results = [choice.result for choice in choices if choice.result]
    ids = [choice.ids for choice in choices[:: body.n]]
    prompt_tokens = results[0].prompt_tokens if body.chat else sum(map(len, ids))
    completed = sum(r.completion_tokens if body.chat else len(r.ids) for r in results)
    cached = sum(result.cached_tokens or 0 for result in results[:: body.n])
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completed,
            "total_tokens": prompt_tokens + completed,
            "prompt_tokens_details": {"cached_tokens": cached}}  # fmt: skip


def token_text(tokenizer, i):
    return tokenizer.names.get(i) or tokenizer.token_bytes(i).decode(errors="replace")


def logprobs(chat, tokenizer, tokens, offset=0):
    """tokens: [(id, log-probability, [(id, log-probability) of the likeliest])], both None for a first token
    of a prompt. offset: where in the text they begin."""
    if chat:
        return {"content": [entry(tokenizer, i, p) | {"top_logprobs": [entry(tokenizer, *t) for t in top]}
                            for i, p, top in tokens], "refusal": None}  # fmt: skip
    texts, offsets = [token_text(tokenizer, i) for i, *_ in tokens], []
    for i, *_ in tokens:
        offsets.append(offset)
        offset += len(tokenizer.token_bytes(i).decode(errors="replace"))  # special tokens have none
    # of tokens that read alike the likeliest stays
    tops = [top if top is None else {token_text(tokenizer, i): p for i, p in [(own, mine), *top[::-1]]}
            for own, mine, top in tokens]  # fmt: skip
    return {"tokens": texts, "token_logprobs": [p for _, p, _ in tokens], "top_logprobs": tops,
            "text_offset": offsets}  # fmt: skip


def entry(tokenizer, i, logprob):
    text = token_text(tokenizer, i)
    return {"token": text, "logprob": logprob, "bytes": [*(tokenizer.token_bytes(i) or text.encode())]}
