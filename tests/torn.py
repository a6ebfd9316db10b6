"""Stop a process at its nth file operation, in a write half-way. As a script, kill -9 there:

python tests/torn.py NTH INSIDE COUNT sweep.py some.toml ...     operations below INSIDE; COUNT has their number
"""

import builtins
import itertools
import os
import runpy
import signal
import sys
from pathlib import Path

NAMES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link")  # audit events


class Torn:
    """A file whose write may stop half-way."""

    def __init__(self, file, counted):
        self.file, self.counted = file, counted

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        half = len(data) // 2
        done = self.file.write(data[:half])
        self.counted(self.file.flush)
        return done + self.file.write(data[half:])


def stop_at_file_operation(nth: int, stop, inside: Path, apart: Path) -> None:
    """Call `stop` before the nth open for writing, rename, removal or fsync below `inside` (but not `apart`), or in the
    middle of a write. apart/operations has their number."""
    from nanochin.run import checkpoint

    calls, number_of = itertools.count(1), os.open(apart / "operations", os.O_WRONLY | os.O_CREAT)
    opened, fsync, save = builtins.open, os.fsync, checkpoint.save_file

    def counted(first=lambda: None) -> None:
        number = next(calls)
        os.pwrite(number_of, b"%d" % number, 0)
        if number == nth:
            first()
            stop()

    def below(path) -> bool:
        path = os.path.abspath(path) if isinstance(path, str | os.PathLike) else ""
        return path.startswith(f"{inside}{os.sep}") and not path.startswith(str(apart))

    def hook(event: str, args: tuple) -> None:
        if event in NAMES and below(args[0]):
            counted()

    def torn_open(path, mode="r", *args, **kwargs):
        if not below(path) or not set(mode) & set("wax+"):
            return opened(path, mode, *args, **kwargs)
        counted()
        return Torn(opened(path, mode, *args, **kwargs), counted)

    def counted_fsync(handle) -> None:
        if below(os.readlink(f"/proc/self/fd/{handle}")):
            counted()
        fsync(handle)

    def torn_save(tensors, path, *metadata) -> None:  # written by another library
        save(tensors, path, *metadata)
        counted(lambda: os.truncate(path, path.stat().st_size // 2))

    builtins.open, os.fsync, checkpoint.save_file = torn_open, counted_fsync, torn_save
    sys.addaudithook(hook)


if __name__ == "__main__":
    nth, inside, apart, *sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    stop_at_file_operation(int(nth), lambda: os.kill(os.getpid(), signal.SIGKILL), Path(inside), Path(apart))
    runpy.run_path(sys.argv[0], run_name="__main__")
