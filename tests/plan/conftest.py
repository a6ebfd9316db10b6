import sys

import pytest

from nanochin.__main__ import main
from nanochin.base.cli import run_command


@pytest.fixture
def cli(monkeypatch, capsys):
    """`cli("flops", "--seq-len=8", code=0)`: python -m nanochin in this process -> its output, or its error of one line
    if `code`."""

    def run(*argv: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["nanochin", *argv])
        with pytest.raises(SystemExit) as end:
            run_command(main, "python -m nanochin")
        out, err = capsys.readouterr()
        assert (end.value.code, err.count("\n")) == (code, 1 if code else 0), err
        return err or out

    return run
