"""The signals that end a command: Ctrl-C (SIGINT), SIGTERM, and SIGHUP when its terminal is closed.

Imports almost nothing, so that a command can call `end_quietly` before its other imports.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # as the OS has


def end_quietly() -> None:
    """For the seconds of a command's imports: Ctrl-C ends the process without a traceback."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))


@contextmanager
def handled(handler: Callable[[int], object]) -> Iterator[None]:
    """In the block, signals of ENDING call `handler` with their number. Those that the process ignores stay ignored:
    SIGHUP under nohup, SIGINT in a background job of a script. Threads other than the main one cannot set handlers."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in ENDING if main}
    before = {number: old for number, old in before.items() if old != signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda number, _: handler(number))
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
