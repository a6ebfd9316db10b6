"""Signals that end a command: what a real process does when it gets one."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

SCRIPT = """
import os, signal, sys, time
from nanochin.base import signals
signals.end_quietly()
{imports}
from nanochin.base.cli import run_command
def main():
    try:
        {work}
    finally:
        print("tidy")
run_command(main, "x")
print("never")
"""
WAIT = "print('ready', flush=True); time.sleep(60)"


def prepare(ignored: tuple = ()) -> None:
    """In a child process: only these signals are ignored, whatever this process ignores."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN if each in ignored else signal.SIG_DFL)


def send(number: int, ignored: tuple = (), **parts) -> tuple[int, str]:
    """Run SCRIPT with `parts`, send the signal when it says "ready" -> (exit code, output of both kinds)."""
    code = SCRIPT.format(**{"imports": "", "work": WAIT} | parts)
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, preexec_fn=lambda: prepare(ignored), **both)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    return process.wait(30), process.stdout.read()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_a_command(number, code):
    """Silently, after its `finally` blocks, with 128 + the number as exit code."""
    assert send(number) == (code, "tidy\n")


def test_during_imports():
    """Ctrl-C ends the process at once and silently."""
    assert send(signal.SIGINT, imports=WAIT) == (130, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ignored(number):
    """A signal that is ignored from the start stays ignored, also during imports."""
    short = "print('ready', flush=True); time.sleep(0.5)"
    assert send(number, (number,), imports=short, work="print('worked')") == (0, "worked\ntidy\n")
    assert send(number, (number,), work=short) == (0, "tidy\n")


@pytest.mark.parametrize("command", ["train.py", "sweep.py", "fit.py"])
def test_commands_are_quiet_during_imports(command):
    """Ctrl-C while a command imports a module that takes a minute."""
    code = "import runpy, sys, time, importlib.abc\n"
    code += "class Slow(importlib.abc.MetaPathFinder):\n    def find_spec(self, name, *_):\n"
    code += "        if name == 'nanochin.base.cli': print('ready', flush=True); time.sleep(60)\n"
    code += f"sys.meta_path.insert(0, Slow())\nrunpy.run_path({command!r}, run_name='__main__')"
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, preexec_fn=prepare, **both)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert (process.wait(30), process.stderr.read()) == (130, "")
