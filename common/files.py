"""Files written whole, files read with a clear error, JSON lines, directories with a manifest; usage errors."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the checkout


OUT = ROOT / "out"  # everything that is made goes here unless --out says otherwise


class UsageError(Exception):
    """Something the user can mend: the message says what is wrong, where, and what to do, in one line."""


@contextlib.contextmanager
def write_whole(path, mode="w"):
    """Opens a temporary neighbour of `path`; on success it is flushed, synced and renamed to `path`, else removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)
        temporary.unlink(missing_ok=True)
        raise


def read_text(path):
    """The text of a file the user named, or a UsageError that says why not."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    if not text.strip():
        raise UsageError(f"{path}: the file is empty")
    return text


def read_json(path, kind=dict):
    """The JSON of a file the user named, of the given kind (or kinds), or a UsageError that says why not."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}: not JSON (line {error.lineno}, column {error.colno}: {error.msg})"
        ) from None
    except (RecursionError, ValueError) as error:  # too deep, or an integer of thousands of digits
        raise UsageError(f"{path}: JSON that cannot be read ({error})") from None
    if not isinstance(value, kind):
        raise UsageError(f"{path}: holds a {type(value).__name__} where something else is expected")
    return value


def read_lines(path, keys):
    """The objects of a JSONL file of ours, each with these keys; [] where there is no file.

    A torn last line, as a kill leaves it, is left out; anything else that is not such an object is a UsageError.
    """
    *whole, last = Path(path).read_bytes().split(b"\n") if Path(path).exists() else [b""]
    read = []
    for number, line in enumerate([*whole, last] if last else whole, 1):
        try:
            read.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if number > len(whole):
                break
            raise UsageError(f"{path}: line {number} is not JSON ({error}); mend or remove it") from None
        if not isinstance(read[-1], dict) or not read[-1].keys() >= set(keys):
            raise UsageError(
                f"{path}: line {number} is not an object with {', '.join(keys)}; mend or remove it"
            )
    return read


def append_line(path, value):
    """Adds a JSON value as a line to a file, on the disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_lines(path, values):
    """Writes a JSONL file whole."""
    with write_whole(path) as file:
        file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def make_dir(path):
    """Creates an output directory, or says why it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot make this directory: {error.strerror}; choose another --out"
        ) from None
    if not os.access(path, os.W_OK):
        raise UsageError(f"{path}: not writable; choose another --out")
    return Path(path)


MANIFEST = "manifest.json"


@contextlib.contextmanager
def whole_directory(directory):
    """Yields a temporary neighbour; on success it gets a manifest and takes the place of `directory`, else it is removed."""
    directory = Path(directory)
    temporary = directory.with_name(f".{directory.name}.tmp")
    make_dir(directory.parent)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        manifest = {str(file.relative_to(temporary)): checksum(file) for file in files}
        _write_json(temporary / MANIFEST, manifest)
        sync_directory(temporary)
        old = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if directory.exists():
            os.rename(directory, old)
        try:
            os.rename(temporary, directory)
        except OSError:
            if old.exists():
                os.rename(old, directory)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def verify(directory, rank=0, world=1):
    """UsageError if a directory with a manifest lacks one of its files or one was altered. Without a manifest, nothing.

    Of several ranks each reads its share of the files.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).is_file():
        return
    for name, expected in sorted(read_json(directory / MANIFEST).items())[rank::world]:
        file = directory / name
        if not file.is_file() or checksum(file) != expected:
            raise UsageError(f"{file}: altered or truncated since it was saved; use another checkpoint")


def checksum(file):
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_directory(directory):
    """Puts the names in a directory on the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(path, value):
    with write_whole(path) as file:
        json.dump(value, file, indent=1)
