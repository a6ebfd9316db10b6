"""The command: the law that made a sweep comes back from it, and no output is ever half written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_up_sweep import BUDGETS, LAW, loss, optimal, sweep, write_sweep

import fit
from nanochin import laws
from nanochin import study as study_module
from nanochin.answers import optimum
from nanochin.config import UserError, run_command
from nanochin.rows import best_tuning, read_rows
from nanochin.study import Approach, Cost, Settings, check, findings, study_runs

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data" / "chinchilla_svg_extracted.csv"
QUICK = ("--bootstrap=100", "--figures=none")


REMEMBERED = {}


def remember(study, progress=study_module.silent):
    """`check`, once for the same rows and settings: what is written is of interest here, not how often."""
    key = (study.rows.sha256, len(study.N), study.settings, study.curves is None)
    if key not in REMEMBERED:
        REMEMBERED[key] = check(study)
    return REMEMBERED[key]


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(path, "--drop=5", code=0)`: fit.py in this process -> what it printed (to stderr, if it refused)."""
    monkeypatch.setattr(fit, "check", remember)

    def command(*argv, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["fit.py", *map(str, argv)])
        capsys.readouterr()
        try:
            run_command(fit.main, "fit.py")
            ended = 0
        except SystemExit as exit:
            ended = exit.code
        out, err = capsys.readouterr()
        assert ended == code, err
        assert code == 0 or (err.count("\n") == 1 and err.startswith("fit.py: ")), err
        return err if code else out

    return command


@pytest.fixture(scope="session")
def made_up(tmp_path_factory) -> Path:
    """A sweep with noise, curves and FLOPs that are not 6ND."""
    return write_sweep(tmp_path_factory.mktemp("sweep") / "made-up", sweep(physical=0.5))


def read(folder: Path) -> dict:
    return json.loads((folder / "laws.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# The answer


def test_the_law_of_a_noise_free_sweep_comes_back(run, tmp_path):
    """Approach 3 returns the constants that made the losses, and `load_law` (as train.py --law reads it) plans by
    them: least loss at a budget among 20,001 sizes that were tried."""
    write_sweep(tmp_path, sweep(noise=0), curves=False)
    run(tmp_path, *QUICK)
    found = read(tmp_path / "fit")["approach3"]
    for name, value in LAW.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    law = laws.load_law(tmp_path / "fit" / "laws.json")
    for C in (1e12, 3e14):
        assert law.optimal(C) == pytest.approx(optimal(C), rel=2e-3)


def test_every_approach_comes_near_the_law(run, made_up, tmp_path):
    """With 0.3% of noise all three exponents are near beta / (alpha + beta), in their own intervals; laws.json holds
    what design promises."""
    out = run(made_up, "--bootstrap=400", "--figures=none", "--out", tmp_path)
    a, found = LAW["beta"] / (LAW["alpha"] + LAW["beta"]), read(tmp_path)
    for number, far in ((1, 0.08), (2, 0.04), (3, 0.03)):
        assert found[f"approach{number}"]["a"] == pytest.approx(a, abs=far)
        law = laws.load_law(tmp_path / "laws.json", number)
        assert law.a == pytest.approx(found[f"approach{number}"]["a"], rel=1e-12)
        assert f"approach {number}   " in out and f"{law.a:.4f}" in out
    meta = found["meta"]
    assert meta["n_runs"] == 28 and meta["params_convention"] == "total" and meta["flops_convention"] == "physical"
    assert meta["tokenizer"] == "bytes" and meta["val_sha"] == "e" * 64 and meta["bootstrap"] == 400
    assert {"source", "data_sha", "dropped", "cluster", "level", "sha256", "command", "git"} <= meta.keys()


def test_budgets_are_spent_as_they_are_counted():
    """At a budget in exact FLOPs the optimum of Approach 3 costs that budget by the formula that made the sweep, where
    6ND would be a third off; and it is where Eq. 4 puts it for its own 6ND."""
    rows, physical = sweep(noise=0, physical=0.5), 0.5
    N, D, C = (np.array([row[name] for row in rows], float) for name in ("params", "tokens", "flops"))
    law, cost = laws.Law("made up", **LAW), Cost.of(N, D, C)
    for budget in (2e12, 1e13, 5e13):
        six = cost.as_6nd(law, budget)
        n, d = law.optimal(six)
        assert 6 * n * d == pytest.approx(six) and abs(6 * n * d / budget - 1) > 0.15
        assert 6 * n * d * (1 + physical * (1e5 / n) ** 0.3) == pytest.approx(budget, rel=2e-3)
    assert Cost.of(N, D, 6 * N * D).as_6nd(law, 1e13) == 1e13


def test_approach_2_can_answer_alone(tmp_path, run):
    """With E far above what the losses allow Approach 3 is refused, with its reason in laws.json and on the terminal;
    the budgets still answer, and load_law says why it cannot."""
    rows = sweep(noise=0)
    for row in rows:  # parabolas in log N, and nothing that a power law could explain
        N, _ = optimal(row["budget"])
        row["loss"] = 3 + 0.05 * np.log(row["params"] / N) ** 2 + 0.01 * np.log(row["budget"] / 1e12)
    write_sweep(tmp_path, rows, curves=False)
    out = run(tmp_path, *QUICK)
    found = read(tmp_path / "fit")
    assert found["approach3"] is None and found["approach2"] is not None
    assert found["meta"]["reasons"]["approach3"] and "! Approach 3 gives no law" in out
    with pytest.raises(UserError, match="no approach 3"):
        laws.load_law(tmp_path / "fit" / "laws.json")
    assert (tmp_path / "fit" / "report.html").exists()


def test_without_bootstrap(run, made_up, tmp_path):
    """--bootstrap=0 gives the same law, no interval anywhere and a report."""
    out = run(made_up, "--bootstrap=0", "--figures=none", "--out", tmp_path)
    assert "[" not in out.split("starts end")[0] and "interval" not in out
    assert "ci" not in read(tmp_path)["approach3"] or not read(tmp_path)["approach3"]["ci"]
    assert 'class="ci"' not in (tmp_path / "report.html").read_text().split("<script")[0]


def test_curves_come_from_logs_or_from_a_table(run, made_up, tmp_path):
    """The curves of a folder's logs and the same curves in a CSV give the same Approach 1; without curves there is
    none, and that is no reason to refuse."""
    lines = ["run,params,tokens,loss"]
    for row in sweep(physical=0.5):
        for line in (made_up / "runs" / row["run"] / "log.jsonl").read_text().splitlines()[:-1]:
            moment = json.loads(line)
            lines.append(f"{row['run']},{row['params']},{moment['tokens']},{moment['loss']!r}")
    (tmp_path / "curves.csv").write_text("\n".join(lines))
    shutil.copy(made_up / "runs.csv", tmp_path / "alone.csv")
    run(made_up, *QUICK, "--out", tmp_path / "logs")
    run(tmp_path / "alone.csv", *QUICK, "--curves", tmp_path / "curves.csv", "--out", tmp_path / "table")
    run(tmp_path / "alone.csv", *QUICK)
    from_logs, from_table = (read(tmp_path / name)["approach1"] for name in ("logs", "table"))
    assert from_logs["a"] == pytest.approx(from_table["a"], rel=1e-9)
    alone = read(tmp_path / "fit-alone")
    assert alone["approach1"] is None and "curves" in alone["meta"]["reasons"]["approach1"]


def test_curves_are_of_runs_and_of_numbers(run, made_up, tmp_path):
    """A run has one curve however many rows it has, and points of a log that are no loss are left out."""
    clean = write_sweep(tmp_path / "clean", sweep(physical=0.5))
    log = sorted((clean / "runs").glob("*/log.jsonl"))[5]
    log.write_text('{"step": 1, "tokens": 900, "loss": NaN}\n{"step": 1, "tokens": 9, "loss": "x"}\n' + log.read_text())
    rows = (clean / "runs.csv").read_text().splitlines()
    (clean / "runs.csv").write_text("\n".join([*rows, *rows[1:]]))
    run(made_up, *QUICK, "--out", tmp_path / "a")
    run(clean, *QUICK, "--out", tmp_path / "b")
    one, other = (read(tmp_path / name)["approach1"] for name in "ab")
    assert other["n_curves"] == one["n_curves"] and other["a_ci"] == one["a_ci"]


def test_a_run_without_a_name_is_one_of_its_own():
    """Blank names do not make one run of many rows."""
    rows = sweep(noise=0.002)
    for row in rows[::2]:
        row["run"] = ""
    assert len(set(study_runs(_as_rows(rows), settings=Settings(bootstrap=0)).unit)) == len(rows)


def test_6nd_counts_all_parameters(run, made_up, tmp_path):
    """--params non_embedding --flops 6nd is the column flops_6nd, by hand 6 x params x tokens."""
    study = study_runs(_as_rows(sweep()), settings=Settings(params="non_embedding", flops="6nd", bootstrap=0))
    np.testing.assert_allclose(study.C, [row["flops_6nd"] for row in sweep()], rtol=1e-12)


def test_no_interval_without_its_reason(run, made_up, tmp_path, monkeypatch):
    """An approach whose bootstrap is refused says why."""

    def refused(fit, **_):
        raise laws.NotIdentified("bootstrap: as the test says")

    monkeypatch.setattr(laws, "bootstrap", refused)
    out = run(made_up, *QUICK, "--seed=5", "--out", tmp_path)
    assert "! Approach 3 has no intervals: bootstrap: as the test says." in out


def test_figures_of_very_large_runs(run, tmp_path):
    """Beyond 1e25 FLOPs, and beyond int64, the figures go on to the right."""
    scale = {"params": 10**13, "tokens": 10**13, "flops": 1e26, "flops_6nd": 10**26, "budget": 1e26}
    big = [row | {name: row[name] * factor for name, factor in scale.items()} for row in sweep()]
    write_sweep(tmp_path, big, curves=False)
    assert "6 figures in SVG" in run(tmp_path, "--bootstrap=0", "--figures=svg")


def test_every_count_of_parameters(run, made_up, tmp_path):
    """--params chooses the column and laws.json says so; a convention that the rows lack is refused."""
    run(made_up, *QUICK, "--params=non_embedding", "--out", tmp_path / "a")
    run(made_up, *QUICK, "--out", tmp_path / "b")
    few, all_ = (read(tmp_path / name)["approach3"] for name in "ab")
    assert read(tmp_path / "a")["meta"]["params_convention"] == "non_embedding"
    assert few["A"] != pytest.approx(all_["A"], rel=1e-3)
    (tmp_path / "c.csv").write_text("params,tokens,loss\n" + "".join(f"{i},{i * i},{9 / i}\n" for i in range(1, 9)))
    assert "params_with_head" in run(tmp_path / "c.csv", *QUICK, "--params=with_head", code=2)


def test_tunings_drops_and_bad_lines_are_counted(run, tmp_path):
    """What is left out is said on the terminal and in laws.json, by reason."""
    rows = sweep(noise=0)
    rows += [{**row, "lr": 0.02, "loss": row["loss"] + 0.1} for row in rows[:4]]
    rows.append({**rows[0], "status": "failed", "loss": ""})
    rows.append({**rows[1], "loss": "nan"})
    write_sweep(tmp_path, rows, curves=False)
    run(tmp_path, *QUICK, code=2)
    out = run(tmp_path, *QUICK, "--skip-bad", "--drop=2")
    expected = {"failed": 1, "not usable": 1, "worse tunings of a run": 4, "of highest loss": 2}
    assert read(tmp_path / "fit")["meta"]["dropped"] == expected
    for reason, number in expected.items():
        assert f"Left out: {number} {reason}" in out


def test_resampling_knows_trunks():
    """Cooldowns of one trunk are resampled together; other runs each by itself; --cluster=row by row."""
    rows = sweep(noise=0.002)
    for i, row in enumerate(rows):
        row["trunk"] = rows[0]["run"] if 0 < i < 5 else ""
    study = study_runs(_as_rows(rows), settings=Settings(bootstrap=50))
    assert len(set(study.unit)) == 28 - 4 and len(set(study.unit[:5])) == 1
    assert study_runs(_as_rows(rows), settings=Settings(bootstrap=0, cluster="row")).unit is None


def _as_rows(rows, tmp=None):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return best_tuning(read_rows(write_sweep(Path(folder), rows, curves=False)))


def test_checks_of_a_clean_sweep():
    """Without noise the held-out budgets are predicted exactly, and no check raises a doubt that there is none for."""
    rows = _as_rows(sweep(noise=0))
    study = study_runs(rows, settings=Settings(bootstrap=0))
    checks = check(study)
    assert len(checks.hold_out.rows) == 7 and checks.hold_out.error < 1e-7
    np.testing.assert_allclose(checks.hold_out.predicted, study.L[checks.hold_out.rows], rtol=1e-6)
    assert checks.hold_out.reach == pytest.approx(BUDGETS[-1] / BUDGETS[-2], rel=1e-3)
    assert all(isinstance(found, Approach) for found in (study.results[2], study.results[3]))
    assert optimum(study.best, 1e13).found["loss"].value == pytest.approx(loss(*optimal(1e13)), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals and faults


@pytest.mark.parametrize(
    "argv, says",
    [((), "required"), (("missing.csv",), "No such file"), (("missing.csv", "--delta=0"), "--delta"),
     (("missing.csv", "--figure=png"), "did you mean --figures"), (("missing.csv", "--columns=N=params"), "--columns"),
     (("missing.csv", "--bootstrap=-1"), "--bootstrap"),
     (("missing.csv", "--budget=abc"), "--budget"), (("missing.csv", "--params=all"), "--params")],
)  # fmt: skip
def test_bad_options(run, tmp_path, monkeypatch, argv, says):
    """One line that names the option or the file, exit code 2, and no folder."""
    monkeypatch.chdir(tmp_path)
    assert says in run(*argv, code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option, says", [("--fixed-e=9", "below it"), ("--bootstrap=3", "too few")])
def test_options_that_the_runs_contradict(run, made_up, tmp_path, option, says):
    """An E above the lowest loss and a bootstrap of three are refused before anything is written."""
    assert says in run(made_up, "--figures=none", option, "--out", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_bad_curves(run, made_up, tmp_path):
    """A table of curves without the column run is refused, and by its own name."""
    (tmp_path / "curves.csv").write_text("params,tokens,loss\n1,2,3\n")
    assert "curves.csv" in run(made_up, *QUICK, "--curves", tmp_path / "curves.csv", code=2)


def test_runs_without_any_law(run, tmp_path):
    """Losses that rise with size and data make no law: one line with the reason of every approach, exit code 2,
    nothing written."""
    grid = [(10 ** (3 + i % 5), 10 ** (6 + i // 5)) for i in range(20)]
    lines = [f"{N},{D},{2 + 0.5 * np.log10(N) - 0.02 * np.log10(N) ** 2 + 0.1 * np.log10(D)}" for N, D in grid]
    (tmp_path / "runs.csv").write_text("params,tokens,loss\n" + "\n".join(lines))
    said = run(tmp_path / "runs.csv", *QUICK, code=2)
    assert all(f"approach {number}" in said for number in (1, 2, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]


def test_a_folder_that_exists_is_not_destroyed(run, made_up, tmp_path):
    """What is not ours stays in the output folder, byte for byte; a second fit replaces its own files."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "sub").mkdir()
    run(made_up, *QUICK, "--out", tmp_path)
    first = (tmp_path / "laws.json").read_bytes()
    run(made_up, *QUICK, "--out", tmp_path, "--drop=3")
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "sub").is_dir()
    assert (tmp_path / "laws.json").read_bytes() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["laws.json", "notes.txt", "report.html", "sub"]


def test_the_output_may_not_be_a_file(run, made_up, tmp_path):
    """--out names a file: one line, and the file is as it was."""
    (tmp_path / "out").write_text("mine")
    assert "cannot write" in run(made_up, *QUICK, "--out", tmp_path / "out", code=1)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("fault", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_the_old_law(run, made_up, tmp_path, monkeypatch, fault):
    """Killed before the rename, with the new file half or wholly written, laws.json is still the old one."""
    run(made_up, *QUICK, "--out", tmp_path)
    before = (tmp_path / "laws.json").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, fault, killed)
    with pytest.raises(KeyboardInterrupt):
        run(made_up, *QUICK, "--out", tmp_path, "--drop=3")
    assert (tmp_path / "laws.json").read_bytes() == before


def test_a_full_disk_is_one_line(run, made_up, tmp_path, monkeypatch):
    """No space left: exit code 1 and the file's name."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said = run(made_up, *QUICK, "--out", tmp_path, code=1)
    assert "laws.json" in said and "No space left" in said


def test_the_same_command_gives_the_same_bytes(run, made_up, tmp_path):
    """Everything written is a function of the command and the data."""
    for _ in range(2):
        run(made_up, "--bootstrap=60", "--figures=svg", "--out", tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / f"out{len(list(tmp_path.iterdir()))}")
    one, two = sorted(tmp_path.iterdir())
    assert len(list(one.iterdir())) == 9
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def test_torch_is_not_imported(made_up, tmp_path):
    """The whole command, figures and report included, does without torch, pandas, scipy and pyplot."""
    code = (
        "import sys, fit; sys.argv[0] = 'fit.py'; fit.main(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'pandas', 'scipy', 'matplotlib.pyplot')))"
    )
    argv = [sys.executable, "-c", code, str(made_up), "--bootstrap=20", f"--out={tmp_path}"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not SHARED.exists(), reason="needs the points of epoch-research/analyzing-chinchilla, "
                    "data/svg_extracted_data.csv, which may not be redistributed")  # fmt: skip
def test_besiroglu_data(run, tmp_path):
    """The 240 digitised runs give the optimum that was found with 4500 starts and tight tolerances elsewhere."""
    out = run(SHARED, "--drop=5", *QUICK, "--out", tmp_path)
    found = read(tmp_path)["approach3"]
    assert found["objective"] == pytest.approx(0.00101827401780, rel=1e-9)
    expected = {"A": 477.826, "B": 2143.417, "E": 1.817218, "alpha": 0.347310, "beta": 0.367172, "a": 0.51390}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-5), name
    assert read(tmp_path)["meta"]["flops_convention"] == "6nd" and "5 of highest loss" in out


def test_checks_of_many_runs_are_made_on_some(monkeypatch):
    """Beyond MOST_CHECKED runs a sample is checked, its hold-out names rows of the whole, and the findings say so."""
    monkeypatch.setattr(study_module, "MOST_CHECKED", 24)
    study = study_runs(_as_rows(sweep(noise=0.001)), settings=Settings(bootstrap=40))
    checks = check(study)
    held = checks.hold_out
    assert checks.runs == 24 and any("24 of the 28 runs" in text for _, text in findings(study, checks))
    np.testing.assert_array_equal(held.observed, study.L[held.rows])
    assert len(study.rows) == 28 and "not checked" not in study.rows.dropped
