"""The output folder of fit.py: other files in it are not touched, and writes are atomic."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK, ROOT
from conftest import read_laws as read

import fit


def test_stale_figures_are_deleted(run, made_up, tmp_path):
    """A second fit without curves deletes the figure of the first, which laws.json lists. Files not listed stay, and so
    do listed ones that are outside the folder or not ours."""
    out = tmp_path / "out"
    run(made_up, "--bootstrap=0", "--figures=svg", "--out", out, checks=False)
    assert (out / "curves.svg").exists() and "curves.svg" in read(out)["meta"]["files"]
    for name in ("mine.svg", "notes.txt"):
        (out / name).write_text("mine")
    (tmp_path / "outside.svg").write_text("mine")
    content = read(out)
    content["meta"]["files"] += ["../outside.svg", "notes.txt", str(tmp_path / "outside.svg")]
    (out / "laws.json").write_text(json.dumps(content))
    shutil.copy(made_up / "runs.csv", tmp_path / "alone.csv")
    run(tmp_path / "alone.csv", "--bootstrap=0", "--figures=svg", "--out", out, checks=False)
    assert not (out / "curves.svg").exists() and (out / "isoflop.svg").exists()
    assert (out / "mine.svg").exists() and (out / "notes.txt").exists() and (tmp_path / "outside.svg").exists()


@pytest.mark.parametrize("list_of_files", [None, "{", '{"meta": {"files": 3}}'])
def test_other_files_are_not_overwritten(run, made_up, tmp_path, monkeypatch, list_of_files):
    """A report, figure or laws.json that no fit has written is an error before anything is computed, unless --figures
    would not write it."""
    out = tmp_path / "out"
    out.mkdir()
    mine = {"report.html": "mine", "optimum.svg": "mine"} | ({"laws.json": list_of_files} if list_of_files else {})
    for name, content in mine.items():
        (out / name).write_text(content)
    with monkeypatch.context() as patch:
        patch.setattr(fit, "analyse", lambda *_: pytest.fail("computed first"))
        said = run(made_up, "--figures=svg", "--out", out, code=2)
    assert all(name in said for name in mine) and "curves" not in said
    assert {path.name: path.read_text() for path in out.iterdir()} == mine
    for name in mine.keys() - {"optimum.svg"}:
        (out / name).unlink()
    run(made_up, "--bootstrap=0", "--figures=none", "--out", out, checks=False)
    assert (out / "optimum.svg").read_text() == "mine" and (out / "report.html").exists()
    assert "optimum.svg" in run(made_up, "--figures=svg", "--out", out, code=2)  # laws.json is ours, this is not


def test_the_output_must_be_a_writable_folder(run, made_up, tmp_path, monkeypatch):
    """--out in a file, or in a folder without write permission: an error before anything is computed."""
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(fit, "analyse", lambda *_: pytest.fail("computed first"))
    for out in ("file", "file/below/it"):
        assert f"{tmp_path / 'file'} is a file" in run(made_up, *QUICK, "--out", tmp_path / out, code=2)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert f"cannot write in {tmp_path}" in run(made_up, *QUICK, "--out", tmp_path / "a" / "b", code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_kill_while_writing_leaves_the_old_law(run, made_up, tmp_path, monkeypatch):
    """Killed before the rename, laws.json is still the old one."""
    run(made_up, *QUICK, "--out", tmp_path, checks=False)
    before = (tmp_path / "laws.json").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    run(made_up, *QUICK, "--out", tmp_path, "--drop=3", code=130, checks=False)
    assert (tmp_path / "laws.json").read_bytes() == before


def test_full_standard_output(made_up, tmp_path):
    """A fit whose standard output takes nothing writes its files; one line on standard error says so."""
    with open("/dev/full", "w") as full:
        argv = [sys.executable, "fit.py", made_up, "--bootstrap=0", "--figures=none", "--out", tmp_path]
        done = subprocess.run(argv, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and "No space left" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["laws.json", "report.html"]


@pytest.mark.parametrize("failed", ["report.html", "laws.json"])
def test_a_full_disk_is_one_line(run, made_up, disk, tmp_path, failed):
    """Exit code 1 and the file's name; no file stays that the next fit would refuse to overwrite. With free space the
    same command gives the same law."""
    here, there = disk.folder / "fit", tmp_path / "fit"
    run(made_up, *QUICK, "--out", there, checks=False)
    pages = -(-(there / "report.html").stat().st_size // 4096)  # of 4 KB
    disk.fill(leave=4096 * pages * (failed == "laws.json"))
    said = run(made_up, *QUICK, "--out", here, code=1, checks=False)
    assert said == f"fit.py: {here / failed}: cannot write: No space left on device\n" and not list(here.iterdir())
    disk.filler.unlink()
    run(made_up, *QUICK, "--out", here, checks=False)
    (one, meta), (two, _) = ((laws, laws.pop("meta")) for laws in map(read, (here, there)))
    assert one == two and meta["files"] == ["report.html"]


def test_the_same_command_gives_the_same_bytes(run, made_up, tmp_path):
    """All output is a function of the command and the data; all names are known before."""
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    for kept in (one, two):
        run(made_up, "--bootstrap=100", "--figures=svg", "--out", out)
        out.rename(kept)
    assert len(list(one.iterdir())) == 9 and {path.name for path in one.iterdir()} <= set(fit.OUTPUTS)
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name
