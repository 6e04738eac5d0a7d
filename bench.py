"""Measurements: ours against a peer in the same run, or against what the machine can do.

    python bench.py NAME [--peer transformers] [--rounds N] [--json FILE]

What is compared is interleaved, ours and the peer's in turn, and medians are taken, since machines are noisy. A table goes to
stdout; its last line is the same as JSON, with the command that reproduces it.
"""

import concurrent.futures
import functools
import json
import multiprocessing
import re
import resource
import statistics
import sys
import tempfile
import time
import types
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint
import kernels
import train
from checkpoint import load_model, save_model
from common import terminal
from common.files import ROOT, UsageError, write_whole
from data.packing import IGNORE
from data.scenes import STAGE, load_scenes
from data.stream import Stream
from engine.engine import Engine
from engine.params import SamplingParams
from llm.local import BUNDLED_ACTOR, Local
from llm.reply import Reply
from model import PRESETS, ModelConfig
from play.perform import perform
from play.protocol import Protocol
from tokenizer import STAGE_TOKENIZER, load_tokenizer

SHARED = ROOT.parent / "shared" / "data"  # real books and tokenizers, where they are at hand


def seconds(run, sync=lambda: None):
    """How long run() takes, in seconds."""
    sync()
    begun = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - begun


def interleave(runs, rounds=5, sync=lambda: None):
    """Median seconds of each of {name: function}, run in turn for so many rounds after one that is not counted."""
    times = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            took = seconds(run, sync)
            if number:
                times[name].append(took)
    return {name: statistics.median(taken) for name, taken in times.items()}


def machine_limits(device="cpu", dtype=torch.float32):
    """(bytes a second of a large copy, operations a second of a large matrix product), the best of several tries each."""
    sync = torch.cuda.synchronize if device != "cpu" else lambda: None
    big = 2**28 if device != "cpu" else 2**25
    source, target = torch.ones(big, device=device), torch.empty(big, device=device)
    n = 8192 if device != "cpu" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    copy = min(seconds(lambda: target.copy_(source), sync) for _ in range(5))
    product = min(seconds(lambda: a @ b, sync) for _ in range(5))
    return 2 * source.nbytes / copy, 2 * n**3 / product


def report(title, rows, path=None):
    """Prints rows (dicts with the same keys) as a table, then as one line of JSON with the command; also to a file."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        floats = {
            name: f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
            for name, value in row.items()
            if type(value) is float
        }
        table.add_row(*(str(value) for value in {**row, **floats}.values()))
    (terminal.stdout if terminal.stdout.is_terminal else Console(width=120)).print(table)
    line = json.dumps(
        {
            "benchmark": title,
            "command": f"python {' '.join(sys.argv)}",
            "torch": torch.__version__,
            "rows": rows,
        }
    )
    print(line)
    if path:
        with write_whole(path) as file:
            file.write(line + "\n")


def kernel_cases(device, dtype):
    """What `kernels` measures: (kernel, shape, operations forward or None, bytes forward, and backward as a multiple of that,
    {version: function}, inputs that take gradients). Sizes for a GPU, or such that a CPU is done in a minute."""
    cuda = device == "cuda"
    H, K, D, C = (32, 8, 128, 4096) if cuda else (8, 2, 64, 1024)
    backends = {"sdpa flash": SDPBackend.FLASH_ATTENTION} | (
        {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION} if cuda else {}
    )
    # documents of a packed row as in CoSER: 1,640 tokens on average, the longest 4,319; on a CPU an eighth
    documents = [n // (1 if cuda else 8) for n in (2032, 1003, 4319, 1689, 640, 1217, 2711, 500, 1451, 822)]

    def random(*shape):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    def sdpa(backend, q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
            )

    for B, lengths, size in (
        (4, [4096 if cuda else 512], D),
        (4, [4096 if cuda else 512], D // 2),
        (1, documents, D),
    ):
        inputs = q, k, v = [random(B, sum(lengths), heads, size) for heads in (H, K, K)]
        positions = (
            torch.cat([torch.arange(n, device=device) for n in lengths])[None] if len(lengths) > 1 else None
        )
        pairs, shape = B * sum(n * (n + 1) / 2 for n in lengths), f"{B} x {sum(lengths)} x {H}/{K} x {size}"
        versions = {"ours": functools.partial(kernels.attention, *inputs, positions)}
        versions |= {
            f"{name}{' dense' * (B == 1)}": functools.partial(sdpa, b, *inputs)
            for name, b in backends.items()
        }
        name = "attention, packed" if B == 1 else "attention"
        yield name, shape, 4 * pairs * H * size, None, 2.5, versions, inputs

    S, length, page = (128, 1792, 64) if cuda else (16, 512, 64)
    q, pages = random(S, 1, H, D).detach(), random(2, S * length // page, page, K, D).detach()
    table = torch.randperm(S * length // page, device=device).view(S, -1).int()
    k, v = pages.view(2, S, length, K, D).transpose(2, 3)
    for s in (1, S):
        lengths = torch.full((s,), length, dtype=torch.int32, device=device)
        versions = {
            "ours": functools.partial(kernels.decode_attention, q[:s], *pages, table[:s], lengths),
            "sdpa, not paged": functools.partial(
                F.scaled_dot_product_attention, q[:s].transpose(1, 2), k[:s], v[:s], enable_gqa=True
            ),
        }
        yield (
            "decode attention",
            f"{s} x {length} x {H}/{K} x {D}",
            None,
            k[:s].nbytes * 2,
            None,
            versions,
            [],
        )

    x, residual, weight = random(8192, C), random(8192, C), random(C)
    versions = {
        "ours": lambda: kernels.rms_norm(x, weight),
        "F.rms_norm": lambda: F.rms_norm(x, (C,), weight, 1e-5),
    }
    yield "RMSNorm", f"8192 x {C}", None, 2 * x.nbytes, 1.5, versions, [x, weight]
    versions = {
        "ours": lambda: kernels.rms_norm(x, weight, 1e-5, residual),
        "F.rms_norm": lambda: (F.rms_norm(total := x + residual, (C,), weight, 1e-5), total),
    }
    yield "RMSNorm, residual", f"8192 x {C}", None, 4 * x.nbytes, 1, versions, [x, weight, residual]


def bench_kernels(args):
    """Each kernel forward and backward against torch; on a CPU the twins. Backward is both passes less the forward one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bytes_limit, operations_limit = machine_limits(device, dtype)
    clock = seconds
    if device == "cuda":  # the time on the GPU alone: launched as one CUDA graph
        from triton.testing import do_bench_cudagraph

        clock = lambda run: do_bench_cudagraph(run, rep=50, return_mode="median") / 1e3  # noqa: E731
    rows = []
    for kernel, shape, operations, moved, factor, versions, inputs in kernel_cases(device, dtype):
        runs = {}
        for version, run in versions.items():
            runs[version, "forward"] = torch.no_grad()(run)
            if inputs:

                def both(run=run, inputs=inputs):
                    out = run()
                    out = out if isinstance(out, tuple) else (out,)
                    torch.autograd.grad(out, inputs, out)

                runs[version, "backward"] = both
        times = [{name: clock(run) for name, run in runs.items()} for _ in range(args.rounds + 1)][1:]
        medians = {name: statistics.median(taken[name] for taken in times) for name in runs}
        for (version, way), took in medians.items():
            took -= medians[version, "forward"] if way == "backward" else 0
            work = (operations or moved) * (factor if way == "backward" else 1)
            rate, unit, scale = work / took, "TFLOP/s" if operations else "GB/s", 1e12 if operations else 1e9
            row = dict(
                kernel=kernel,
                shape=shape,
                version=version,
                way=way,
                ms=took * 1e3,
                rate=rate / scale,
                unit=unit,
            )
            rows.append(row | {"of the limit": rate / (operations_limit if operations else bytes_limit)})
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, the twins"
    limits = f"{operations_limit / 1e12:.3g} TFLOP/s, {bytes_limit / 1e9:.4g} GB/s"
    report(f"kernels, {name}, {str(dtype)[6:]}; limits measured: {limits}", rows, args.json)


# ---- generation ---------------------------------------------------------------------------------------------------------


def random_actor(device, dtype):
    """A model of random weights, in the shape of one of 135M parameters, on a GPU of LLaMA 3.1 8B."""
    small = dict(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    small |= dict(vocab_size=49_152, head_dim=64, tie_word_embeddings=True, max_position_embeddings=8192)
    large = dict(PRESETS["llama-3.1-8b"], vocab_size=128_256)
    model = checkpoint.build_model(
        ModelConfig(**(large if device == "cuda" else small)), device, dtype
    ).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator) if parameter.ndim > 1 else parameter.fill_(1)
    return model


class Peer:
    """The same weights in transformers, greedily, step by step, with one of its caches."""

    def __init__(self, model, tmp, cache):
        from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

        dtype, device = model.model["embed_tokens"].weight.dtype, model.model["embed_tokens"].weight.device
        self.model = AutoModelForCausalLM.from_pretrained(tmp, dtype=dtype).to(device).eval()
        self.new_cache = {"dynamic": lambda n: DynamicCache(config=self.model.config),
                          "static": lambda n: StaticCache(config=self.model.config, max_cache_len=n)}[cache]  # fmt: skip

    @torch.inference_mode()
    def start(self, prompts, new):
        self.cache = self.new_cache(len(prompts[0]) + new)
        self.tokens = torch.tensor(prompts, device=self.model.device)
        self.step()

    @torch.inference_mode()
    def step(self):
        output = self.model(self.tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.tokens = output.logits[:, -1].argmax(-1, keepdim=True)


class Ours:
    def __init__(self, model):

        self.engine = Engine(model, max_batch=256)

    def start(self, prompts, new):

        self.sequences = [self.engine.add(prompt, SamplingParams(0, max_tokens=new))[0] for prompt in prompts]
        while any(len(s.ids) == s.prompt_tokens for s in self.sequences):
            self.step()

    def step(self):
        self.engine.step()


def generation(args, runs):
    """Seconds of prefill and of a step of decoding of each side: runs [(batch, prompt tokens, new tokens)], for every dtype.

    Yields (dtype, bytes of weights, bytes of keys and values a token, {(side, run): (prefill, step)}).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    for dtype in (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16):
        model = random_actor(device, dtype)
        sides = {"ours": Ours(model)}
        if args.peer:
            with tempfile.TemporaryDirectory() as tmp:
                checkpoint.save_model(model, tmp + "/model")
                sides |= {
                    f"peer, {cache} cache": Peer(model, tmp + "/model", cache)
                    for cache in ("dynamic", "static")
                }
        times, generator = {}, torch.Generator().manual_seed(0)
        for number in range(args.rounds + 1):
            for run in runs:
                batch, length, new = run
                prompts = torch.randint(
                    0, model.config.vocab_size, (batch, length), generator=generator
                ).tolist()
                for name, side in sides.items():
                    begun = seconds(lambda: side.start(prompts, new + 1), sync)  # noqa: B023
                    steps = [seconds(side.step, sync) for _ in range(new)]
                    if number:
                        times.setdefault((name, run), []).append(
                            (begun, statistics.median(steps) if new else 0)
                        )
        config = model.config
        weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
        yield (
            dtype,
            weights,
            token,
            {k: [statistics.median(x) for x in zip(*v, strict=True)] for k, v in times.items()},
        )


def decode(args):
    """Tokens a second of a step of decoding, and the bytes it reads as a share of what the machine copies."""
    cuda = torch.cuda.is_available()
    runs = [(1, 1800, 32), (32, 1800, 32), (128, 1800, 32)] if cuda else [(1, 128, 24), (16, 128, 24)]
    rows = []
    for dtype, weights, token, times in generation(args, runs):
        limit = machine_limits("cuda" if cuda else "cpu", dtype)[0]
        best = {
            run: min((t[1] for (name, r), t in times.items() if r == run and name != "ours"), default=None)
            for run in runs
        }
        for (name, run), (_, step) in times.items():
            batch, length, new = run
            read = weights + batch * (length + new / 2) * token
            row = {
                "dtype": str(dtype)[6:],
                "side": name,
                "batch": batch,
                "context": length,
                "tokens/s": batch / step,
            }
            row |= {"GB/s": read / step / 1e9, "of copy": read / step / limit}
            if args.peer:
                row["x peer"] = best[run] / step
                row["x peer's batch 1"] = batch * best[runs[0]] / step
            rows.append(row)
    report("decode", rows, args.json)


def prefill(args):
    """Tokens a second of taking a prompt in, its first token included."""
    runs = [(1, 512, 0), (1, 2048, 0)] if not torch.cuda.is_available() else [(1, 2048, 0), (8, 2048, 0)]
    rows = []
    for dtype, _, _, times in generation(args, runs):
        best = {
            run: min((t[0] for (name, r), t in times.items() if r == run and name != "ours"), default=None)
            for run in runs
        }
        for (name, run), (begun, _) in times.items():
            row = {
                "dtype": str(dtype)[6:],
                "side": name,
                "batch": run[0],
                "prompt": run[1],
                "tokens/s": run[0] * run[1] / begun,
            }
            rows.append(row | ({"x peer": best[run] / begun} if args.peer else {}))
    report("prefill", rows, args.json)


def training(args):
    """One step of train.py on packed rows against the peer: documents in padded batches of 8, and the same packed rows.

    Rows of 8,192 leave nearly all chats whole, rows of 4,096 cut the long ones, which leaves less to pad. At a 128k vocabulary
    the padded peer, which would need some 20 GB, is left out.
    """
    books = SHARED / "coser" / "books" if (SHARED / "coser").is_dir() else STAGE
    llama3, results = SHARED / "tokenizers" / "llama3", []
    cases = [  # what, rows, of so many tokens, the peers
        ("4k vocabulary, row of 8,192", STAGE_TOKENIZER, 1, 8192, ["padded", "packed"]),
        ("4k vocabulary, rows of 4,096", STAGE_TOKENIZER, 2, 4096, ["padded"]),
        ("128k vocabulary, row of 4,096", llama3, 1, 4096, ["packed"]),
    ]
    train.start_ranks()
    with tempfile.TemporaryDirectory() as made:
        for case, path, *rows, peers in cases:
            if not path.exists():
                continue
            setting, losses = (
                (str(books), str(path), str(Path(made) / case), *rows, peers if args.peer else []),
                {},
            )
            sides, tokens = training_sides(*setting)
            noted = {name: functools.partial(note_loss, losses, name, run) for name, run in sides.items()}
            seconds = interleave(noted, args.rounds)
            if max(losses.values()) - min(losses.values()) > 1e-4 * losses["ours"]:
                raise AssertionError(f"the losses differ: {losses}")
            for name, took in seconds.items():
                with multiprocessing.get_context("spawn").Pool(
                    1
                ) as alone:  # a process that does nothing else
                    peak = alone.apply(training_peak, (*setting, name))
                results.append(
                    {
                        "case": case,
                        "side": name,
                        "tok/s": tokens / took,
                        "peak GiB": peak,
                        "loss": losses[name],
                    }
                )
                ours = next(row for row in results if row["case"] == case)
                results[-1] |= {
                    "ours / tok/s": ours["tok/s"] * took / tokens,
                    "ours / peak": ours["peak GiB"] / peak,
                }
    report("train", results, args.json)


def note_loss(losses, name, run):
    losses[name] = run()


def training_sides(books, tokenizer, directory, number, seq_len, peers):
    """({side: one training step that returns its loss}, tokens of a step), all sides from the same weights, in fp32."""
    tokenizer = load_tokenizer(Path(tokenizer))
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **PRESETS["stage"])
    options = dict(
        micro_batch=1, clip=1.0, dtype="float32", recompute="none", compile=False, shard_ranks=None, lr=1e-6
    )
    options = types.SimpleNamespace(**options, weight_decay=0.0)
    device = torch.device("cpu")
    model = train.shard_model(config, device, options)
    checkpoint.fill(model, checkpoint.RandomWeights(model, 0))
    rows = Stream([books], tokenizer, seq_len).take(number)[:]
    optimizer = train.make_optimizer(model, options)
    sides = {"ours": lambda: train.train_step(model, optimizer, rows, options, device)["loss"]}
    if peers:
        checkpoint.save_model(model, directory)
    if "padded" in peers:
        documents = [part for row in rows for part in training_documents(row)]
        batches = [training_batch(documents[i : i + 8]) for i in range(0, len(documents), 8)]
        sides["peer, padded"] = training_peer(directory, batches)
    if "packed" in peers:
        batches = [training_batch([tuple(x[: row["used"]] for x in training_labels(row))]) for row in rows]
        sides["peer, packed"] = training_peer(directory, batches)
    return sides, sum(row["used"].item() for row in rows)


def training_labels(row):
    """(tokens, labels, positions) [T] of a row, labels as transformers has them: at the token itself, not at the one before."""
    labels = F.pad(row["targets"][:-1], (1, 0), value=IGNORE)
    return row["tokens"], labels, row["positions"]


def training_documents(row):
    """The same for each document of a row."""
    parts = [part[: row["used"]] for part in training_labels(row)]
    starts = (parts[2] == 0).nonzero().flatten().tolist()
    return list(zip(*(part.tensor_split(starts[1:]) for part in parts), strict=True))


def training_batch(documents):
    """Documents as the arguments of a forward pass of the peer, padded to the longest; one alone has its positions instead."""
    ids, labels, positions = (list(each) for each in zip(*documents, strict=True))
    if len(ids) == 1:  # packed: from positions it makes the mask of the documents itself
        return {"input_ids": ids[0][None], "labels": labels[0][None], "position_ids": positions[0][None]}
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(each) for each in ids], batch_first=True)
    return {"input_ids": pad(ids, True), "labels": pad(labels, True, IGNORE), "attention_mask": mask}


def training_peer(directory, batches):
    """A training step of transformers over batches."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    supervised = sum((batch["labels"] != IGNORE).sum() for batch in batches)

    def step():
        total = 0.0
        for batch in batches:
            loss = model(**batch, use_cache=False, num_items_in_batch=supervised).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def training_peak(books, tokenizer, directory, number, seq_len, peers, name):
    """Peak resident memory, GiB, of a process that makes two steps of one side."""
    train.start_ranks()
    sides, _ = training_sides(
        books, tokenizer, directory, number, seq_len, [] if name == "ours" else [name.removeprefix("peer, ")]
    )
    sides[name](), sides[name]()
    status = Path("/proc/self/status").read_text(
        "utf-8"
    )  # rusage's would begin at that of the process which started this one
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 2**20


def tokenising(args):
    """The cache of 100,000 chats, built from numbered copies of the books by a process of its own, as train.py builds it."""
    real = (SHARED / "coser").is_dir()
    books, tokenizer = (
        (SHARED / "coser" / "books", SHARED / "tokenizers" / "llama3") if real else (STAGE, STAGE_TOKENIZER)
    )
    with tempfile.TemporaryDirectory() as made:
        made = Path(made)
        scenes = (scene for scene in load_scenes(books) if scene.tag == "train")
        chats = sum(len(scene.speaking_characters) for scene in scenes)  # next-speaker chats come on top
        (made / "books").mkdir()
        for number in range(-(-100_000 // chats)):
            for file in books.glob("*.json"):
                book = {**json.loads(file.read_text("utf-8")), "title": f"{file.stem} {number}"}
                (made / "books" / f"{number}-{file.name}").write_text(json.dumps(book), "utf-8")
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            row = alone.submit(tokenising_alone, made / "books", tokenizer, made / "cache").result()
    report("data", [row], args.json)


def tokenising_alone(books, tokenizer, cache):
    tokenizer, mib = load_tokenizer(tokenizer), 2**10
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / mib
    begun = time.perf_counter()
    stream = Stream([books], tokenizer, 16_384, cache=cache)
    took = time.perf_counter() - begun
    peaks = (
        resource.getrusage(who).ru_maxrss / mib for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    row = {"chats": stream.documents, "chats/s": stream.documents / took, "tok/s": stream.tokens / took}
    return row | dict(zip(("peak MiB", "peak MiB, worker"), peaks, strict=True)) | {"MiB before": before}


# ---- simulation ---------------------------------------------------------------------------------------------------------


class SimulationPeer:
    """The same checkpoint in transformers, given the very token ids of `local`: a chat at a time, its whole history again."""

    local, name, identity = True, "peer", "peer"

    def __init__(self, local, directory):
        from transformers import AutoModelForCausalLM

        self.ours, self.line = local, []
        dtype, device = local.engine.kv.dtype, local.engine.device
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()

    def ask(self, *asked):
        self.line.append(asked)

    @torch.inference_mode()
    def step(self):

        if not self.line:
            return []
        key, messages, params, opening = self.line.pop(0)
        stops = [*self.ours.tokenizer.stop_ids, *self.ours.markers]
        prompt, own = self.ours.prompt(messages, opening)
        tokens = torch.tensor([prompt], device=self.model.device)
        options = dict(
            max_new_tokens=params.max_tokens, do_sample=False, eos_token_id=stops, pad_token_id=stops[0]
        )
        ids = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[
            0, len(prompt) :
        ].tolist()
        end = "stop" if ids[-1] in stops else "length"
        ids = ids[:-1] if end == "stop" else ids
        return [
            (key, Reply(self.ours.tokenizer.decode(ids), end, len(prompt), len(ids), 0, ids, own_tokens=own))
        ]

    def drop(self):
        self.line = []


def simulation(args, count=16):
    """Seconds of so many scenes, greedily: all side by side, and one after the other, with the same engine or with the peer,
    which is the schedule of the code released with the paper. Only runs that say the same, word for word, are compared. What
    is not counted is two rounds of one scene."""
    from data.scenes import load_stage

    scenes, directory = list(load_stage().values())[:count], args.model or BUNDLED_ACTOR
    temporary = tempfile.TemporaryDirectory()
    if (
        args.model == "135m"
    ):  # random weights, which end no turn; ids that no text has are never the likeliest
        tokenizer, actor = load_tokenizer(STAGE_TOKENIZER), random_actor("cpu", torch.float32)
        directory = temporary.name + "/135m"
        actor.model["embed_tokens"].weight.data[tokenizer.vocab_size :] = 0
        save_model(actor, directory, tokenizer)
    turn = 60 if args.model == "135m" else 512
    protocol = Protocol(
        max_rounds=args.max_rounds, max_tokens=turn, retry_temperature=0.0
    )  # greedy in every try
    played = {}

    def side(name, make, side_by_side):
        def run():
            model, ends, warm = make(), {}, name in played
            rules = protocol if warm else replace(protocol, max_rounds=2)
            models = dict.fromkeys(("actor", "environment", "next_speaker"), model)
            chosen = scenes if warm else scenes[:1]
            perform(
                chosen,
                models,
                rules,
                on_end=lambda s, *end: ends.update({s.key: end}),
                side_by_side=side_by_side,
            )
            played[name] = ends

        return run

    local = Local(directory)
    model = load_model(directory, local.engine.device.type, local.engine.kv.dtype)

    def emptied():
        local.engine = Engine(model, local.tokenizer)  # with nothing in its cache
        return local

    sides = {"ours, side by side": side("ours, side by side", emptied, count)}
    if args.peer:
        peer = SimulationPeer(local, directory)
        sides["peer, one by one"] = side("peer, one by one", lambda: peer, 1)
    else:
        sides["ours, one by one"] = side("ours, one by one", emptied, 1)
    medians, rows = interleave(sides, args.rounds), []
    said = {name: {key: messages for key, (messages, *_) in ends.items()} for name, ends in played.items()}
    different = [name for name in said if said[name] != said["ours, side by side"]]
    if different:
        raise UsageError(f"{', '.join(different)}: another text than ours, so there is nothing to compare")
    for name, took in medians.items():
        totals = {
            key: sum(stats[key] for _, stats, _ in played[name].values())
            for key in ("decoded", "prefilled", "least")
        }
        row = {"side": name, "seconds": took, "tokens/s": totals["decoded"] / took, **totals}
        rows.append(row | {"x": took / medians["ours, side by side"]})
    report(
        f"simulate: {count} scenes, {args.max_rounds} rounds, {args.model or 'the stage actor'}",
        rows,
        args.json,
    )


BENCHMARKS = {
    "kernels": bench_kernels, "train": training, "data": tokenising,
    "decode": decode, "prefill": prefill, "simulate": simulation,
}  # fmt: skip


def main():
    parser = terminal.Parser(__doc__, "python bench.py kernels")
    parser.add_argument("name", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--peer", choices=["transformers"], help="measure it in the same run")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, interleaved (default: 5)")
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="simulate: the actor, or 135m for random weights (default: the bundled)",
    )
    parser.add_argument(
        "--max-rounds", type=int, default=20, help="simulate: rounds of a scene (default: 20)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the last line to a file as well")
    args = parser.parse_args()
    if args.rounds < 1:
        raise UsageError(f"--rounds is at least 1, not {args.rounds}")
    BENCHMARKS[args.name](args)


if __name__ == "__main__":
    terminal.run(main)
