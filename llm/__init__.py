"""The one interface between a script and a language model: a local engine, or an OpenAI-compatible endpoint.

    model = open_model("out/stage/final")                    # a checkpoint directory
    model = open_model("openai:gpt-4o")                      # OPENAI_API_KEY, OPENAI_BASE_URL
    model = open_model("openai:llama@http://localhost/v1")   # OPENAI_API_KEY_LOCALHOST, else OPENAI_API_KEY
    replies = model.chat([messages, ...], params)            # a list of Reply, in order

What fails for one prompt (400, the context, the deadline) is a Reply with an `error`; what fails for all
requests (401, 403, 404) is a UsageError. Reasoning is in `Reply.reasoning`, never in `Reply.text`.
"""

import re

from common.files import UsageError
from llm.endpoint import Endpoint
from llm.local import Local, default_actor
from llm.reply import Reply

__all__ = ["Reply", "default_actor", "open_model"]


def open_model(spec, chat_format=None, dtype=None, **options):
    """The model of `openai:MODEL`, `openai:MODEL@URL` or a checkpoint directory.

    It has `name`, `local`, `identity`, `chat_format_reason` and `adaptations`, and all that llm.reply.Model
    has; a local one also `spoken`. chat_format, dtype: of a checkpoint. options: of an Endpoint (answers,
    concurrency, per_minute).
    """
    spec = str(spec)
    if spec.startswith("openai:"):
        model, _, url = spec.removeprefix("openai:").partition("@http")
        if not model or re.search(r"@[\w.-]+:\d+|@\w+://", model):
            hint = "with a URL that begins with http:// or https://"
            raise UsageError(f"{spec}: write openai:MODEL or openai:MODEL@URL, {hint}")
        return Endpoint(model, f"http{url}" if url else None, **options)
    return Local(spec, dtype, chat_format)
