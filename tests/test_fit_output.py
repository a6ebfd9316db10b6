"""The folder that fit.py writes to: nothing of others in it is touched, and no output is ever half written."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import QUICK
from conftest import read_laws as read

import fit


def test_a_folder_that_exists_is_not_destroyed(run, made_up, tmp_path):
    """What is not ours stays in the output folder, byte for byte; a second fit replaces its own files."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "sub").mkdir()
    run(made_up, *QUICK, "--out", tmp_path, checks=False)
    first = (tmp_path / "laws.json").read_bytes()
    run(made_up, *QUICK, "--out", tmp_path, "--drop=3", checks=False)
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "sub").is_dir()
    assert (tmp_path / "laws.json").read_bytes() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["laws.json", "notes.txt", "report.html", "sub"]


def test_stale_figures_are_deleted(run, made_up, tmp_path):
    """A second fit without curves has no figure of them: that of the first, which its laws.json lists, is deleted.
    Figures that no list names stay, and a list cannot name what lies outside the folder or is no figure."""
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


@pytest.mark.parametrize("list_of_files", [None, "{", "[]", '{"meta": {"files": 3}}', '{"law": "mine"}'])
def test_files_of_others_are_not_written_over(run, made_up, tmp_path, monkeypatch, list_of_files):
    """A report, a figure or a laws.json that no fit has written is refused by its name before anything is computed,
    and left as it was; what --figures would not write is in nobody's way."""
    out = tmp_path / "out"
    out.mkdir()
    mine = {"report.html": "mine", "optimum.svg": "mine"} | ({"laws.json": list_of_files} if list_of_files else {})
    for name, content in mine.items():
        (out / name).write_text(content)
    with monkeypatch.context() as patch:
        patch.setattr(fit, "analyse", lambda *_: pytest.fail("computed first"))
        said = run(made_up, "--figures=svg", "--out", out, code=2)
    assert all(name in said for name in mine) and "curves" not in said and "another folder" in said
    assert {path.name: path.read_text() for path in out.iterdir()} == mine
    for name in mine.keys() - {"optimum.svg"}:
        (out / name).unlink()
    run(made_up, "--bootstrap=0", "--figures=none", "--out", out, checks=False)
    assert (out / "optimum.svg").read_text() == "mine" and (out / "report.html").exists()
    assert "optimum.svg" in run(made_up, "--figures=svg", "--out", out, code=2)  # laws.json is ours, this is not


def test_every_figure_has_a_name_that_is_known_before(run, made_up, tmp_path):
    """What may be written over is known before it is drawn: no fit writes a file that is not among these."""
    run(made_up, "--bootstrap=0", "--figures=all", "--out", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} <= set(fit.OURS)


@pytest.mark.parametrize("out", ["file", "file/below", "file/below/it"])
def test_the_output_may_not_be_a_file(run, made_up, tmp_path, monkeypatch, out):
    """--out names a file, or a folder below one: refused by that file before anything is computed."""
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(fit, "analyse", lambda *_: pytest.fail("computed first"))
    assert f"{tmp_path / 'file'} is a file" in run(made_up, *QUICK, "--out", tmp_path / out, code=2)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_output_must_be_writable(run, made_up, tmp_path, monkeypatch):
    """A folder in which one may not write, or whose nearest parent is one, is refused before anything is computed."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr(fit, "analyse", lambda *_: pytest.fail("computed first"))
    for out in (tmp_path, tmp_path / "a" / "b"):
        assert f"cannot write in {tmp_path}" in run(made_up, *QUICK, "--out", out, code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_the_old_law(run, made_up, tmp_path, monkeypatch, fault):
    """Killed before the rename, with the new file half or wholly written, laws.json is still the old one."""
    run(made_up, *QUICK, "--out", tmp_path, checks=False)
    before = (tmp_path / "laws.json").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, fault, killed)
    run(made_up, *QUICK, "--out", tmp_path, "--drop=3", code=130, checks=False)
    assert (tmp_path / "laws.json").read_bytes() == before


def test_a_full_disk_is_one_line(run, made_up, tmp_path, monkeypatch):
    """No space left: exit code 1 and the file's name, and nothing is left that the next fit would take for foreign."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said = run(made_up, *QUICK, "--out", tmp_path, code=1, checks=False)
    assert "report.html" in said and "No space left" in said
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".tmp"]


def test_the_same_command_gives_the_same_bytes(run, made_up, tmp_path):
    """Everything written is a function of the command and the data."""
    for _ in range(2):
        run(made_up, "--bootstrap=100", "--figures=svg", "--out", tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / f"out{len(list(tmp_path.iterdir()))}")
    one, two = sorted(tmp_path.iterdir())
    assert len(list(one.iterdir())) == 9
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name
