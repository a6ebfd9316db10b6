"""Loggers: what they receive, that nothing is imported or written without them, and that they end no run."""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import numpy as np
import pytest
from conftest import arguments

import train
from nanochin.interop.loggers import open_logger, send_sweep
from nanochin.run.folder import read_log

pytestmark = pytest.mark.usefixtures("one_thread")


def accumulated(folder: Path):
    """The event files of a run, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def events(folder: Path) -> dict[tuple[str, int], list[float]]:
    """(name, step) -> values in the event files of a run."""
    accumulator, found = accumulated(folder), {}
    for name in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(name):
            found.setdefault((name, event.step), []).append(event.value)
    return found


@pytest.mark.parametrize("interrupted", [False, True])
def test_tensorboard_has_the_rows_of_the_log(tiny, monkeypatch, interrupted):
    """Every number once, with its name and step, also if steps are trained again after an interruption, and step 40
    evaluated again."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    config = tiny(name="run", loggers=("tensorboard",), eval_every=20, save_steps=(40,), keep=9)
    if interrupted:
        real, steps = train.train_step, []
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(train, "train_step", lambda *a: steps.append(1) or (1 / (len(steps) < 75) and real(*a)))
            train.train(config, quiet=True)
    train.train(config, quiet=True)
    folder = Path(config.out) / "run"
    rows = {(key, row["step"]): value for row in read_log(folder) for key, value in row.items() if value is not None}
    rows = {key: [pytest.approx(value, rel=1e-6)] for key, value in rows.items() if key[0] != "step"}
    assert events(folder) == rows and ("val_loss", 60) in rows and len(rows) > 50


def test_wandb_offline(tiny, monkeypatch):
    """wandb receives the rows, the options and the run's name, and is finished at the end."""
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    remote = Mock()
    monkeypatch.setattr(wandb, "init", remote)
    config = tiny(name="run", loggers=("wandb",))
    train.train(config, quiet=True)
    (started,) = remote.call_args_list
    assert (started.kwargs["name"], started.kwargs["project"]) == ("run", "nanochin")
    assert started.kwargs["config"]["options"]["model"] == "16x1"
    rows = [call.log(row, step=row["step"]) for row in read_log(Path(config.out) / "run")]
    assert remote.return_value.mock_calls == [*rows, call.finish()]


@pytest.fixture
def stand_in(monkeypatch) -> Mock:
    """In place of wandb."""
    wandb = Mock(__spec__=Mock(), Image=Path)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def test_a_resumed_run_goes_on_in_wandb(stand_in, tmp_path):
    """A folder keeps its id; another of the same name has another; one of an earlier version has its name as its id."""
    folders = [tmp_path / "a/run", tmp_path / "a/run", tmp_path / "b/run", tmp_path / "old"]
    (tmp_path / "old/wandb").mkdir(parents=True)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        open_logger("wandb", folder, {}, 0)
    first, again, other, old = (each.kwargs["id"] for each in stand_in.init.call_args_list)
    assert first == again != other and old == "old"
    assert {each.kwargs["resume"] for each in stand_in.init.call_args_list} == {"allow"}


@pytest.fixture
def fitted(tmp_path) -> Path:
    """The folder of a sweep with a law and a figure."""
    from matplotlib.image import imsave

    (tmp_path / "mini").mkdir()
    (tmp_path / "mini/laws.json").write_text('{"law": {"E": 1.25, "alpha": 0.5, "space": "log", "ci": {}}}')
    imsave(tmp_path / "mini/isoflop.png", np.zeros((4, 5, 3)))
    return tmp_path / "mini"


def test_figures_and_law_of_a_sweep_in_wandb(stand_in, fitted, capsys):
    """The figures and the constants are sent; a failure is a note, for what else there is to send."""
    send_sweep("wandb", fitted)
    run = stand_in.init.return_value
    run.summary.update.assert_called_once_with({"law/E": 1.25, "law/alpha": 0.5})
    run.log.assert_called_once_with({"isoflop": fitted / "isoflop.png"})
    assert run.finish.called and not capsys.readouterr().err
    stand_in.init.side_effect = OSError("no network")
    send_sweep("wandb", fitted)
    assert "note: wandb failed" in capsys.readouterr().err


def test_figures_and_law_of_a_sweep_in_tensorboard(fitted):
    """Sent twice, each is there once."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    for _ in range(2):
        send_sweep("tensorboard", fitted)
    assert events(fitted) == {("law/E", 0): [1.25], ("law/alpha", 0): [0.5]}
    assert [image.step for image in accumulated(fitted).Images("isoflop")] == [0]


@pytest.mark.slow
def test_real_wandb(tiny, command, monkeypatch):
    """The real library in offline mode writes its files into the run's folder."""
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = command("train.py", *arguments(tiny(name="run", loggers=("wandb",))))
    assert done.returncode == 0, done.stderr
    assert list((Path(tiny().out) / "run" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_library_names_the_command(tiny, monkeypatch, refusal, name):
    """One line with the install command, before anything is read or written."""
    monkeypatch.setitem(sys.modules, name, None)
    assert f"pip install {name}" in refusal(*arguments(tiny(loggers=(name,), data=("nowhere.txt",))))
    assert not Path(tiny().out).exists()


@pytest.mark.parametrize("method", ["init", "log", "finish"])
def test_a_logger_that_fails(tiny, monkeypatch, capsys, method):
    """An exception of the library, at the start, in a row or at the end: one note, and the run has all its rows."""
    run = SimpleNamespace(log=Mock(), finish=Mock())
    wandb = Mock(__spec__=Mock(), init=Mock(return_value=run))
    failing = wandb.init if method == "init" else getattr(run, method)
    failing.side_effect = OSError("no network\nat all")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train.train(tiny(name="run", loggers=("wandb",)), quiet=True)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "note: wandb" in err and "no network at all" in err
    assert failing.call_count == 1 and read_log(Path(tiny().out) / "run")[-1]["step"] == 100
    assert (Path(tiny().out) / "run" / "summary.json").exists()


def test_a_library_that_cannot_be_imported(tiny, monkeypatch, capsys, tmp_path):
    """An installed library with an error inside: one note, and the run is trained."""
    (tmp_path / "wandb.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert train.train(tiny(name="run", loggers=("wandb",)), quiet=True)["status"] == "finished"
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "nowhere_to_be_found" in err
