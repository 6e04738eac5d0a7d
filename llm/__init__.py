"""The one interface between a script and a language model: a local engine, or an OpenAI-compatible endpoint.

    model = open_model("out/stage/final")                    # a checkpoint directory
    model = open_model("openai:gpt-4o")                      # OPENAI_API_KEY, OPENAI_BASE_URL
    model = open_model("openai:llama@http://localhost/v1")   # OPENAI_API_KEY_LOCALHOST, else OPENAI_API_KEY
    replies = model.chat([messages, ...], params)            # a list of Reply, in order

Requests to endpoints are limited in number at once and per minute, and retried with growing pauses (or as
Retry-After says) until a number of tries or a deadline. What fails for one prompt (400, the context, the
deadline) is a Reply with an `error`; what fails for all requests (401, 403, 404) is a UsageError. Keys are
sent to the endpoint and nowhere else. Answers can be kept on disk, each under the hash of its request.
Reasoning is in `Reply.reasoning`, never in `Reply.text`.
"""

import re

from common.files import UsageError
from llm.endpoint import Endpoint
from llm.local import Local, default_actor
from llm.reply import Reply

__all__ = ["Reply", "default_actor", "open_model"]


def open_model(spec, chat_format=None, dtype=None, **options):
    """`openai:MODEL`, `openai:MODEL@URL` or a checkpoint directory -> a model with `name`, `local`,
    `identity`, `adaptations` and `chat`; a local one also has `score`, `ask`, `step`, `spoken` and `drop`, an
    endpoint `submit`.

    chat_format, dtype: of a checkpoint (an endpoint applies its own). options: of an Endpoint (answers,
    concurrency, per_minute).
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
