import sys

import pytest

from nanochin.__main__ import main
from nanochin.base.cli import run_command


@pytest.fixture
def cli(monkeypatch, capsys):
    """`cli("flops", "--seq-len=8")` -> (exit code, stdout, stderr) of python -m nanochin, in this process."""

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nanochin", *argv])
        with pytest.raises(SystemExit) as end:
            run_command(main, "python -m nanochin")
        return end.value.code, *capsys.readouterr()

    return run
