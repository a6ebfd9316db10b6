"""Files that are whole or absent, and the versions of a record."""

import hashlib
import os
import re
import subprocess

import pytest

from nanochin import files
from nanochin.config import RunError
from nanochin.files import replacing, sha256_of, versions, write_file


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_file_keeps_the_old_one_on_failure(tmp_path, monkeypatch, call):
    """A disk that refuses at any point leaves the old content, and the error names the file."""
    path = tmp_path / "file.json"
    write_file(path, b"old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(RunError, match=f"{path}: cannot write: No space left on device"):
            write_file(path, b"new")
    assert path.read_bytes() == b"old"
    write_file(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_write_file_never_shows_half_a_file(tmp_path, monkeypatch):
    """Whenever the new content is not yet complete on disk, a reader still sees the old file."""
    path, seen, fsync = tmp_path / "file.json", [], os.fsync
    write_file(path, b"old")

    def look(handle):
        seen.append(path.read_bytes())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", look)
    write_file(path, b"new")
    assert seen == [b"old", b"new"]  # the file before its rename, then the folder


def test_what_is_not_finished_is_not_there(tmp_path):
    """An error inside the block leaves the old file and nothing beside it."""
    path = tmp_path / "file"
    write_file(path, b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_hash_of_a_file(tmp_path):
    """hashlib's of the whole, with every byte told of."""
    content, told = os.urandom(3 * files.PIECE + 5), []
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file", told.append) == hashlib.sha256(content).hexdigest()
    assert sum(told) == len(content) and len(told) > 3


def test_versions_of_what_a_result_depends_on():
    """The record has the versions in use."""
    import numpy
    import torch

    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0] and found["numpy"] == numpy.__version__
    assert found["git"] is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", found["git"])


def test_a_commit_that_is_not_what_ran(tmp_path, monkeypatch):
    """The commit of the folder of the code; -dirty when a tracked file differs from it, staged or not, but not for
    files that git does not know or that runs write to a folder results; None outside git and without git."""
    home = tmp_path / "code" / "nanochin"
    (home.parent / "results").mkdir(parents=True)
    home.mkdir()
    for path in (home / "files.py", home.parent / "fit.py", home.parent / "results" / "laws.json"):
        path.write_text("1")
    monkeypatch.setattr(files, "__file__", str(home / "files.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert versions()["git"] is None

    def git(*words):
        name = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", "-C", home.parent, *name, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "all")
    commit = git("rev-parse", "HEAD")
    (home.parent / "new.txt").write_text("1")
    (home.parent / "results" / "laws.json").write_text("2")
    assert versions()["git"] == commit
    (home.parent / "fit.py").write_text("2")
    assert versions()["git"] == f"{commit}-dirty"
    git("add", "fit.py")
    assert versions()["git"] == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert versions()["git"] is None
