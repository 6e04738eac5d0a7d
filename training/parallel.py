"""The ranks of a run (processes of torchrun): joining, agreeing on errors; the model, sharded."""

import contextlib
import ctypes
import functools
import os
import signal
import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as recompute

import checkpoint
import kernels
from common.files import UsageError
from model import Transformer
from training import lora

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # of torchrun --max-restarts
PR_SET_PDEATHSIG = 1  # prctl(2): the signal this process gets when its parent dies

aten = torch.ops.aten
MATRIX_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default}


def start_ranks():
    """Joins the process group of torchrun, or makes one of a single rank; returns this rank's device."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:
        if sys.platform == "linux":  # a rank must not go on writing to --out after its torchrun was killed
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # torchrun's store survives a restart; the prefix hides the entries of the ranks that died
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt-{RESTARTS}", store)
    else:
        store, rank, world = dist.HashStore(), 0, 1
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def agreed():
    """Raises an error of any rank on all ranks, as one UsageError; otherwise they would wait for it for ever.

    A collective. It catches UsageError, OSError and errors of torch.distributed.checkpoint. A rank may only
    fail where the others are not in the middle of another collective.
    """
    error = None
    try:
        yield
    except (OSError, UsageError, CheckpointException) as failure:
        if isinstance(failure, CheckpointException) and failure.failures:
            failure = next(iter(failure.failures.values()))[0]
        error = str(failure)
        if isinstance(failure, OSError) and failure.strerror:
            where = failure.filename2 or failure.filename
            error = f"{where}: {failure.strerror}" if where else failure.strerror
    errors = [error for error in gather(error) if error is not None]
    if errors:
        raise UsageError(errors[0] or "an error without a message")


def gather(value):
    """The values of all ranks, in their order: any objects that pickle takes."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(values, device):
    """The sums of a sequence of numbers over all ranks, as a list of floats."""
    values = torch.as_tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


@contextlib.contextmanager
def stop_requests():
    """Yields a list that is empty until Ctrl-C or SIGTERM, so that the ranks can agree where to stop.

    torchrun passes both signals on to every rank.
    """
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


def shard_model(config, device, args):
    """A Transformer without values yet; each block, then the rest, is sharded over the ranks.

    args: dtype (of compute), recompute, compile, shard_ranks, lora, lora_alpha. Master weights and gradient
    reduction are fp32. One rank that computes in fp32 has nothing to shard or cast and gets a plain module.
    With LoRA the frozen base is kept in the dtype of compute, and the adapters cast themselves.
    """
    dtype = checkpoint.DTYPES[args.dtype]
    with torch.device("meta"):
        model = Transformer(config)
        if args.lora:
            model = lora.add_adapters(model.to(dtype), args.lora, args.lora_alpha)
    for block in model.model["layers"]:  # in the order that composes: recompute, compile, shard
        if args.recompute != "none":
            options = {}
            if args.recompute == "selective":
                options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep_products)
            block.forward = functools.partial(recompute, block.forward, use_reentrant=False, **options)
        if args.compile:
            if not kernels.runs_triton(device):  # the torch version loops over the documents of a row
                block.self_attn.attention = torch.compiler.disable(kernels.attention)
            block.forward = torch.compile(block.forward)
    if WORLD_SIZE > 1 or (dtype != torch.float32 and not args.lora):
        options = {
            "mesh": make_mesh(device, args.shard_ranks or WORLD_SIZE),
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        }
        for block in model.model["layers"]:
            fully_shard(block, **options)
        fully_shard(model, **options)
    return model.to_empty(device=device)


def keep_products(_, operation, *args, **kwargs):
    """The policy of selective recomputation: keep the outputs of matrix products, recompute the rest."""
    keep = operation in MATRIX_PRODUCTS
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def make_mesh(device, shards):
    """All ranks as one group of shards, or as several groups (copies of the model) of `shards` ranks each."""
    if shards == WORLD_SIZE:
        return init_device_mesh(device.type, (shards,), mesh_dim_names=("shard",))
    shape = (WORLD_SIZE // shards, shards)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
