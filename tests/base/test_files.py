"""Atomic file writes, and the commit in a record."""

import hashlib
import math
import os
import subprocess

import pytest

from nanochin.base import files
from nanochin.base.cli import RunError, UserError
from nanochin.base.files import read_json, sha256_of, versions, write_file, write_json


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


FORM = {"count": int, "share": float | int, "name": str | None, "inner": {"on": int | None}, "flag": bool}
RECORD = {"count": 3, "share": 0.5, "inner": {"on": 1}, "flag": True, "other": [1, {"a": "\u00e9"}]}


def test_records_round_trip(tmp_path):
    """A record is read back as written, wherever its values came from; one without a seal or an inner object too."""
    path = tmp_path / "record.json"
    write_json(path, RECORD)
    assert read_json(path, FORM) == RECORD
    path.write_text('{"count": 1, "share": 1, "flag": false}')
    assert read_json(path, FORM) == {"count": 1, "share": 1, "flag": False}


WRONG = [{"count": None}, {"count": True}, {"count": 3.0}, {"count": "3"}, {"share": math.nan}, {"share": 10**400},
         {"share": math.inf}, {"name": 1}, {"inner": []}, {"inner": {"on": True}}, {"flag": 1}]  # fmt: skip


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_records_of_another_form(tmp_path, change):
    """One line names the file, the key and the value, and says what to do."""
    path = tmp_path / "record.json"
    write_json(path, RECORD | change)
    ((key, _),) = change.items()
    with pytest.raises(UserError, match=rf"^{path}: cannot be read \({key}.* not .*\); restore it$"):
        read_json(path, FORM, "restore it")


def test_records_that_were_changed(tmp_path):
    """Whatever byte is flipped, the record is refused, or what is read is what was written."""
    path, refused = tmp_path / "record.json", 0
    write_json(path, RECORD)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            found = read_json(path)
        except UserError:
            refused += 1
        else:
            found = {key: value for key, value in found.items() if len(key) < len(files.SEAL)}  # the name of its seal
            assert found == RECORD
    assert refused > len(content) / 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_no_temporary_file_is_left(tmp_path, error):
    """Also if something else than the disk ends the write."""
    with pytest.raises(error), files.replacing(tmp_path / "a") as file:
        file.write(b"x")
        raise error
    assert not list(tmp_path.iterdir())


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
