"""Loggers: what they receive, that nothing is imported or written without them, and that they end no run."""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
from conftest import arguments

import train
from nanochin.run.folder import read_log

pytestmark = pytest.mark.usefixtures("one_thread")


def events(folder: Path) -> dict[tuple[str, int], list[float]]:
    """(name, step) -> values in the event files of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    found: dict = {}
    for name in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(name):
            found.setdefault((name, event.step), []).append(event.value)
    return found


@pytest.mark.parametrize("interrupted", [False, True])
def test_tensorboard_has_the_rows_of_the_log(tiny, monkeypatch, interrupted):
    """Every number once, with its name and step, also if steps are trained again after an interruption."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    config = tiny(name="run", loggers=("tensorboard",), eval_every=30, save_steps=(40,), keep=9)
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
    assert (started.kwargs["id"], started.kwargs["project"]) == ("run", "nanochin")
    assert started.kwargs["config"]["options"]["model"] == "16x1"
    rows = [call.log(row, step=row["step"]) for row in read_log(Path(config.out) / "run")]
    assert remote.return_value.mock_calls == [*rows, call.finish()]


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
