"""Console output: counts, text that is shown, and standard streams that are full, closed or gone."""

import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from nanochin.base import console
from nanochin.base.console import Output, Progress, above, count, lasting_output, shown, table

NASTY = "[/]\x1b[2J:smile:\r\x07\x9b[b]"  # markup, escape codes, an emoji by name


@pytest.mark.parametrize(
    "number, text",
    [(7_654_321, "7.65M"), (1.4321e15, "1430T"), (2.162e14, "216T"), (1e12, "1T"), (0.5, "0.5"), (5e19, "5e+19")],
)
def test_counts(number, text):
    """Three significant digits and a suffix, an exponent only if very large."""
    assert count(number) == text


def test_the_sign_of_an_error_is_a_word():
    assert [above(0.02), above(-0.0005), above(0.05, 0)] == ["2.00% above", "0.05% below", "5% above"]


def test_shown():
    """Of all characters, newline and tab are the only control characters that stay; letters of any script do."""
    assert shown("a\tb\né中🙂\\") == "a\tb\né中🙂\\"
    assert shown("\x1b[31m\r\x00\x7f\x9b\u202e\udcff") == r"\x1b[31m\r\x00\x7f\x9b\u202e\udcff"
    everything = shown("".join(map(chr, range(0x3000))))
    assert {char for char in everything if not char.isprintable() and ord(char) < 256} == {"\t", "\n", "\xa0", "\xad"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_strings_are_not_markup(monkeypatch, stream):
    """A name with markup or escape codes is printed as it is, or with its escape codes shown: in a table, above a bar
    and by print."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", stream())
    out = sys.stdout
    with lasting_output("x"), Progress() as progress:
        table("title", [("name", NASTY, "reason")])
        progress("stage", 1, 2)
        progress.say(NASTY)
        progress.close()
        print(NASTY)
    assert out.getvalue().count(shown(NASTY)) == 3
    assert not {"\x07", "\x9b"} & set(out.getvalue()) and "\x1b[2J" not in out.getvalue()
    assert ("\x1b[" in out.getvalue()) == (stream is Terminal)  # the bar


def run_script(code: str, redirect: str = "", script: str = "x") -> subprocess.CompletedProcess:
    """A command whose `main` is `code`, with redirections of the shell; prints "done" to the file descriptor 9."""
    lines = ["import os, sys, time", "from nanochin.base.cli import UserError, run_command", "def main():"]
    lines += [f"    {line}" for line in code.splitlines()] + ["    os.write(9, b'done')", "run_command(main, 'x')"]
    shell = f'exec 9>&1; {{ "$0" -c "$1"; }} {redirect}'
    argv = ["bash", "-c", shell, sys.executable, "\n".join(lines)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)


PRINTS = "for i in range(99): print('line\\n' * 999); print(i, flush=True)"
GONE = {"> /dev/full": "No space left", ">&-": "closed", ">&- <&-": "closed", "| head -1 > /dev/null": "Broken pipe"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("redirect", GONE)
@pytest.mark.parametrize("code", [PRINTS, "print('a line')\ntime.sleep(0.2)"])
def test_standard_output_is_gone(code, redirect):
    """The command goes on to its end, and one line on standard error says what happened."""
    done = run_script(code, redirect)
    assert (done.returncode, done.stdout) == (0, "done")
    if code == PRINTS or "head" not in redirect:  # `head` reads one line
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("x: standard output: ") and GONE[redirect] in done.stderr


@pytest.mark.parametrize("redirect", ["2>&-", "2> /dev/full", ">&- 2>&-", "> /dev/full 2>&1", ">&- 2>&- <&-"])
def test_standard_error_is_gone(redirect):
    """Notes and errors then go nowhere: the command goes on, and the exit code of an error stays."""
    done = run_script(PRINTS + "\nprint('note', file=sys.stderr, flush=True)", redirect)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("done")
    assert run_script("raise UserError('no')", redirect).returncode == 2


def test_closed_descriptors_are_not_given_to_files(tmp_path):
    """A file that a command opens does not become its standard output: what goes there would end in the file."""
    code = f"file = open({str(tmp_path / 'file')!r}, 'w')\nos.write(1, b'x')\nos.write(2, b'y')\nfile.write('mine')"
    assert run_script(code, ">&- 2>&- <&-").returncode == 0
    assert (tmp_path / "file").read_text() == "mine"


def test_output_without_a_descriptor(monkeypatch):
    """A closed stream of a test or a notebook: the reason is given once, and the stream is put back at the end."""
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    with lasting_output("x") as reasons:
        print("one")
        print("two", flush=True)
        assert isinstance(sys.stdout, Output) and len(reasons) == 1
    assert sys.stdout is stream and console.SECONDS_BETWEEN_LINES
