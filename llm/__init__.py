"""The one seam between a script and a language model: a local engine, or an OpenAI-compatible endpoint.

    model = open_model("out/stage/final")                        # a checkpoint directory
    model = open_model("openai:gpt-4o")                          # OPENAI_API_KEY, OPENAI_BASE_URL
    model = open_model("openai:llama@http://127.0.0.1:8000/v1")  # OPENAI_API_KEY_127_0_0_1, else OPENAI_API_KEY
    replies = model.chat([messages, ...], params)                # list of conversations -> list of Reply, in order

Endpoints are asked over HTTP, so many requests at once and a minute, with a bounded number of tries, growing pauses with jitter
between them (a Retry-After is honoured) and a deadline for each request. What fails for one prompt (400, the context, the
deadline) is a Reply with an `error`; what no request can survive (401, 403, 404) is a UsageError. Keys go to the endpoint and
nowhere else. Answers can be kept on disk, each under the hash of what was asked.
"""

import re

from common.files import UsageError
from llm.endpoint import Endpoint
from llm.local import Local, default_actor
from llm.reply import Reply

__all__ = ["Reply", "default_actor", "open_model"]


def open_model(spec, chat_format=None, dtype=None, **options):
    """`openai:MODEL`, `openai:MODEL@URL` or a checkpoint directory -> a model with `name`, `local`, `identity` and `chat`; one
    that is local also has `ask`, `step`, `spoken` and `drop`.

    chat_format, dtype: of a checkpoint. options: those of Endpoint (answers, concurrency, per_minute).
    """
    spec = str(spec)
    if spec.startswith("openai:"):
        model, _, url = spec.removeprefix("openai:").partition("@http")
        if not model or re.search(r"@[\w.-]+:\d+|@\w+://", model):
            raise UsageError(
                f"{spec}: write openai:MODEL or openai:MODEL@URL, with a URL that begins with http:// or https://"
            )
        return Endpoint(model, f"http{url}" if url else None, **options)
    return Local(spec, dtype, chat_format)
