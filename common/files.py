"""Files: atomic writes, reading with one-line errors, JSONL, directories with a manifest of checksums."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the checkout
OUT = ROOT / "out"  # where everything is written unless --out says otherwise
MANIFEST = "manifest.json"


class UsageError(Exception):
    """Something the user can fix. The message is one line: what is wrong, where, and what to do."""


# ---- reading ----------------------------------------------------------------------------------------------


def read_text(path):
    """The text of a UTF-8 file, without its byte-order mark. UsageError if it cannot be read."""
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
    """The JSON value of a file, of type `kind` (or one of several); else a UsageError."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise UsageError(f"{path}: not JSON ({where})") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or an integer of thousands of digits
        raise UsageError(f"{path}: JSON that cannot be read ({error})") from None
    if not isinstance(value, kind):
        raise UsageError(f"{path}: holds a {type(value).__name__} where something else is expected")
    return value


def read_lines(path, keys):
    """The objects in one of our JSONL files, each with at least `keys`; [] if there is no file.

    An incomplete last line, left by a kill, is ignored; any other line must be such an object (UsageError).
    """
    objects = []
    if not Path(path).exists():
        return objects
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                objects.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    break
                raise UsageError(f"{path}: line {number} is not JSON ({error}); fix or remove it") from None
            if not isinstance(objects[-1], dict) or not objects[-1].keys() >= set(keys):
                wanted = ", ".join(keys)
                raise UsageError(f"{path}: line {number} is not an object with {wanted}; fix or remove it")
    return objects


# ---- writing ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def write_whole(path, mode="w"):
    """Opens a temporary file beside `path`: synced and renamed on success, removed on failure."""
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


def write_json(path, value):
    """Writes a JSON file atomically."""
    with write_whole(path) as file:
        json.dump(value, file, indent=1)


def write_lines(path, values):
    """Writes a JSONL file atomically."""
    with write_whole(path) as file:
        file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def append_line(path, value):
    """Appends a JSON value as one line, synced to disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def make_dir(path):
    """Creates an output directory and returns its Path. UsageError if it cannot be created or written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"cannot create this directory: {error.strerror}"
        raise UsageError(f"{path}: {why}; choose another --out") from None
    if not os.access(path, os.W_OK):
        raise UsageError(f"{path}: not writable; choose another --out")
    return Path(path)


# ---- directories that are complete or absent ---------------------------------------------------------------


@contextlib.contextmanager
def whole_directory(directory):
    """Yields a temporary directory; on success it gets a manifest and replaces `directory`, else it goes."""
    directory = Path(directory)
    temporary = directory.with_name(f".{directory.name}.tmp")
    make_dir(directory.parent)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        paths = sorted(path for path in temporary.rglob("*") if path.is_file())
        write_json(temporary / MANIFEST, {str(path.relative_to(temporary)): checksum(path) for path in paths})
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
    """UsageError if a file in the directory's manifest is missing or altered; no check without a manifest.

    Each of `world` ranks checks its share of the files.
    """
    directory = Path(directory)
    if not (directory / MANIFEST).is_file():
        return
    for name, expected in sorted(read_json(directory / MANIFEST).items())[rank::world]:
        path = directory / name
        if not path.is_file() or checksum(path) != expected:
            raise UsageError(f"{path}: altered or truncated since it was saved; use another checkpoint")


def checksum(path):
    """SHA-256 of a file, which is synced to disk first."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(directory):
    """Syncs a directory's entries, so that renames in it survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
