"""Atomic file writes, and the commit in a record."""

import hashlib
import os
import subprocess

import pytest

from nanochin.base import files
from nanochin.base.cli import RunError
from nanochin.base.files import sha256_of, versions, write_file


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_file_keeps_the_old_one_on_failure(tmp_path, monkeypatch, call):
    """If writing fails at any point, only the old file remains and the error names it."""
    path = tmp_path / "file.json"
    write_file(path, b"old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(RunError, match=f"{path}: cannot write: No space left on device"):
            write_file(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_write_file_is_atomic(tmp_path, monkeypatch):
    """Until the new content is completely on disk, a reader sees the old file."""
    path, seen, fsync = tmp_path / "file.json", [], os.fsync
    write_file(path, b"old")

    def look(handle):
        seen.append(path.read_bytes())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", look)
    write_file(path, b"new")
    assert seen == [b"old", b"new"]  # the file before its rename, then the folder


def test_hash_of_a_file(tmp_path):
    """Equals hashlib's of the whole file; the callback gets every byte."""
    content, told = os.urandom(3 * files.PIECE + 5), []
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file", told.append) == hashlib.sha256(content).hexdigest()
    assert sum(told) == len(content) and len(told) > 3


def test_dirty_commit(tmp_path, monkeypatch):
    """The commit of the code's folder, with -dirty if a tracked file differs, but not for untracked
    files or those in a folder results; None outside git and without git."""
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
    monkeypatch.setenv("PATH", "")
    assert versions()["git"] is None
