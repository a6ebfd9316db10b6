"""Files and the machine: atomic writes, SHA-256, CPU cores, versions."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

from nanochin.base.cli import RunError, UserError

PIECE = 1 << 20  # bytes hashed at a time


class DiskError(RunError):
    """A file cannot be written."""


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); delete it or restore it") from None


def write_json(path: Path, value: dict) -> None:
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Atomic write (temporary file, fsync, rename): a reader sees the old content or the new, never a part."""
    with writing(path), replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file to write in the block; replaces `path` at the end, or is deleted on an error."""
    temp = path.with_name(path.name + ".tmp")
    try:
        with open(temp, "wb") as file:
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
