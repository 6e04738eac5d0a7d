"""Serves any actor as an OpenAI-compatible server, on this machine or, with a key, on a network.

python serve.py                                    the stage actor at http://127.0.0.1:8000/v1, as "coser"
python serve.py --model coser-8b --alias gpt-4o=coser-8b
python serve.py --model model.gguf --host 0.0.0.0 --api-key SECRET
"""

import os
import re
import socket
from pathlib import Path

from common import terminal
from common.files import UsageError
from engine.cpu import DTYPES
from llm import default_actor, open_model
from serving.requests import LOOPBACK
from serving.worker import Served, Worker
from text.chat import CHAT_FORMATS


def parse_args():
    parser = terminal.Parser(__doc__, "python serve.py --model coser-8b --alias gpt-4o=coser-8b")
    add = parser.add_argument
    add("--model", metavar="M", help="checkpoint directory, GGUF file or Hub id (default: a stage actor)")
    add("--alias", metavar="NAME=M", nargs="+", action="extend", default=[],
        help="further names: of a model already served, of a checkpoint, or of openai:MODEL@URL")  # fmt: skip
    add("--host", default="127.0.0.1", help="address to listen on; a key is needed unless it is loopback")
    add("--port", type=int, default=8000, help="(default: %(default)s)")
    key = os.environ.get("COSER_API_KEY")
    add("--api-key", metavar="K", default=key, help="(default: $COSER_API_KEY, or none)")
    add("--origin", nargs="+", action="extend", default=[], help="origins whose pages may send requests")
    add("--max-concurrency", type=int, default=256, metavar="N", help="replies at once; more get 503 (256)")
    add("--judge", metavar="M", help="judges plays on the page: a served name, a checkpoint or openai:MODEL")
    add("--chat-format", choices=CHAT_FORMATS, help="default: what the checkpoint says")
    add("--dtype", choices=DTYPES, help="default: as fits processor and memory; int8 is fast on a CPU")
    add("--log-prompts", action="store_true", help="print the body of every request")
    args = parser.parse_args()
    if args.host not in LOOPBACK and not args.api_key:
        raise UsageError(f"--host {args.host}: others could reach the server; set --api-key as well")
    if not re.fullmatch("[!-~]*", args.api_key or ""):
        raise UsageError("--api-key: a key is printable ASCII without spaces, or clients cannot send it")
    if args.max_concurrency < 2 or not 0 <= args.port < 2**16:
        raise UsageError("--max-concurrency is at least 2, and --port a number below 65536")
    return args


def open_models(args):
    """{name: model} of the command line; a model with several names is loaded once."""
    first = args.model or str(default_actor())
    own = Path(first).resolve().name.removesuffix(".gguf") if args.model else "coser"
    models, opened = {}, {}
    for name, sign, spec in [(own, "=", first), *(alias.partition("=") for alias in args.alias)]:
        if not (name and sign and spec) or name in models:
            raise UsageError(f"--alias {name}{sign}{spec}: write NAME=M, each NAME once")
        place = os.path.realpath(spec) if os.path.exists(spec) else spec
        if spec not in models and place not in opened:
            opened[place] = open_model(spec, args.chat_format, args.dtype)
        models[name] = models[spec] if spec in models else opened[place]
    return models


def judge_of(spec, worker):
    """The judge of --judge: a model that is served already is not loaded again."""
    for name, model in worker.models.items():
        if spec == name or os.path.realpath(spec) == os.path.realpath(model.name):
            return Served(worker, name)
    return open_model(spec)


def main():
    args = parse_args()
    try:
        import uvicorn

        from serving.app import build_app
        from serving.stage import routes
    except ImportError as error:
        raise UsageError(f"{error.name} is missing: pip install -c constraints.txt -e '.[serve]'") from None
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.create_server((args.host, args.port), family=family) as listener:
        models = open_models(args)
        worker = Worker(models, args.max_concurrency)
        hosts = {} if args.host in LOOPBACK else {"hosts": None}
        stage = routes(judge_of(args.judge, worker) if args.judge else None)
        app = build_app(worker, args.api_key, args.origin, args.log_prompts, routes=stage, **hosts)
        host = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{host}:{listener.getsockname()[1]}"
        terminal.note(f"{', '.join(models)} at {url}/v1, and on stage at {url} (Ctrl-C ends)")
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    terminal.run(main)
