"""Files and the machine: atomic writes, JSON records, SHA-256, CPU cores, versions."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import UnionType
from typing import BinaryIO

from nanochin.base.cli import RunError, UserError

PIECE = 1 << 20  # bytes hashed at a time
SEAL = "record_sha256"  # key of a record: SHA-256 of the rest, so that damage that is still JSON is noticed
NUMBER = int | float


class DiskError(RunError):
    """A file cannot be written."""


def read_json(path: Path, form: dict | None = None, remedy: str = "delete it or restore it") -> dict:
    """The object in a JSON file, without its seal. `form`: the type of each key that is used, or for an object its own
    form; a missing object counts as empty, a missing value as None.

    Raises UserError, one line that ends in `remedy`, for a file that is not readable, not an object or of another form,
    and for one that was changed after `write_json`."""
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        if (seal := value.pop(SEAL, None)) and seal != _seal(value):  # older records have none
            raise ValueError("corrupted: SHA-256 differs")
        _check_form(value, form or {})
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); {remedy}") from None
    return value


def write_json(path: Path, value: dict) -> None:
    write_file(path, to_json(value))


def to_json(value: dict) -> bytes:
    """A JSON file with a seal."""
    return (json.dumps(value | {SEAL: _seal(value)}, indent=1) + "\n").encode()


def has_type(value: object, kind: type | UnionType) -> bool:
    """isinstance, but true and false are no integers, and numbers must be finite and fit a float."""
    if isinstance(value, bool):
        return kind is bool or bool in typing.get_args(kind)
    if isinstance(value, NUMBER) and not abs(value) <= sys.float_info.max:
        return False
    return isinstance(value, kind)


def _check_form(value: dict, form: dict, within: str = "") -> None:
    for key, kind in form.items():
        found = value.get(key)
        inner = kind if isinstance(kind, dict) else None
        if not has_type(found, kind if inner is None else dict | None):
            wanted = "an object" if inner is not None else kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"{within}{key} is {found!r:.40}, not {wanted}")
        _check_form(found or {}, inner or {}, f"{within}{key}.")


def _seal(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """Atomic write (temporary file, fsync, rename): a reader sees the old content or the new, never a part."""
    with writing(path), replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file to write in the block; replaces `path` at the end, or is deleted on an error."""
    temp = path.with_name(path.name + ".tmp")
    try:
        with errors_of(path), open(temp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's names, to disk, to survive a power loss."""
    with suppress(PermissionError):  # Windows does not open folders
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def writing(path: Path, remark: str = "") -> Iterator[None]:
    """Turns an OSError inside the block (disk full, no permission) into a one-line DiskError that names the path."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path}: cannot write: {error.strerror or error}{remark}") from None


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """An OSError inside the block that names no file, as that of a write, names this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sha256_of(path: str | Path, progress: Callable[[int], object] = lambda _: None) -> str:
    """SHA-256 of a file, in hexadecimal. Calls progress(bytes) after each piece."""
    sha = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE):
            sha.update(piece)
            progress(len(piece))
    return sha.hexdigest()


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict:
    """Versions that a result depends on, and the commit of this checkout: None outside git, with -dirty if tracked
    files differ from it, except in folders named results, where runs write."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        if git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude,glob)**/results/**"):
            commit += "-dirty"
    except (OSError, subprocess.CalledProcessError):
        commit = None
    packages = {package: version(package) for package in ("torch", "triton", "numpy", "tiktoken", "safetensors")}
    return {"git": commit, "python": platform.python_version(), "platform": platform.platform(), **packages}
