"""The command: it recovers the law that made a sweep, and refuses what it cannot use."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from chinchilla import chinchilla_csv
from conftest import QUICK
from conftest import read_laws as read
from made_up_sweep import BUDGETS, LAW, loss, optimal, sweep, write_sweep

import fit
from nanochin import laws
from nanochin.base.cli import UserError
from nanochin.base.console import count
from nanochin.report import analysis as analysis_module
from nanochin.report import checks as checks_module
from nanochin.report import sensitivity
from nanochin.report.allocate import Questions, answer, optimum
from nanochin.report.analysis import Analysis, Settings, analyse
from nanochin.report.checks import run_checks
from nanochin.report.findings import four
from nanochin.report.table import best_tuning, read_rows
from nanochin.run.curves import CURVES, log_points, to_csv_gz


@pytest.fixture(autouse=True)
def few_resamples_of_refits(monkeypatch):
    """Their values are tested with the laws."""
    monkeypatch.setattr(checks_module, "SENSITIVITY", 20)
    monkeypatch.setattr(sensitivity, "SENSITIVITY", 20)


def analysis_of(rows: list[dict], **settings) -> Analysis:
    """Of a made-up sweep, without curves; `bootstrap` is 0 by default."""
    with tempfile.TemporaryDirectory() as folder:
        table = best_tuning(read_rows(write_sweep(Path(folder), rows, curves=False)))
    return analyse(table, settings=Settings(**{"bootstrap": 0} | settings))


def test_the_law_of_a_noise_free_sweep_comes_back(run, tmp_path):
    """Approach 3 finds the constants that made the losses, and the optimum by `load_law`, which train.py --law uses, is
    the best of 20,001 sizes."""
    write_sweep(tmp_path, sweep(noise=0), curves=False)
    out = run(tmp_path, *QUICK, checks=False)
    found = read(tmp_path / "fit")["approach3"]
    for name, value in LAW.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    law = laws.load_law(tmp_path / "fit" / "laws.json")
    frontier = read(tmp_path / "fit")["law"]["loss_of_C"]
    E, K, c = (four(frontier[name]) for name in "EKc")
    assert f"at the optimum of C: L = {E} + {K} C^-{c}\n" in out
    for C in (1e12, 3e14):
        assert law.optimal(C) == pytest.approx(optimal(C), rel=2e-3)
        assert frontier["E"] + frontier["K"] * C ** -frontier["c"] == pytest.approx(loss(*optimal(C)), rel=1e-6)
    assert set(frontier["ci"]) == {"E", "K", "c"}
    flops, most = [one["flops"] for one in found["optima"]], max(row["flops"] for row in sweep())
    assert flops == pytest.approx([most, 3 * most, 10 * most, 30 * most], rel=5e-3)


def test_every_approach_comes_near_the_law(run, made_up, tmp_path):
    """With 0.3% of noise all three exponents are near beta / (alpha + beta)."""
    out = run(made_up, "--bootstrap=400", "--figures=none", "--out", tmp_path, checks=False)
    a, found = LAW["beta"] / (LAW["alpha"] + LAW["beta"]), read(tmp_path)
    for number, far in ((1, 0.08), (2, 0.04), (3, 0.03)):
        assert found[f"approach{number}"]["a"] == pytest.approx(a, abs=far)
        law = laws.load_law(tmp_path / "laws.json", number)
        assert law.a == pytest.approx(found[f"approach{number}"]["a"], rel=1e-12)
        assert f"approach {number}" in out and f"{law.a:.4f}" in out
    meta = found["meta"]
    assert meta["n_runs"] == 28 and meta["params_convention"] == "total" and meta["flops_convention"] == "physical"
    assert meta["tokenizer"] == "bytes" and meta["val_sha"] == "e" * 64 and meta["bootstrap"] == 400
    assert {"source", "data_sha", "dropped", "cluster", "level", "sha256", "command", "git"} <= meta.keys()


def test_the_optimum_is_that_of_the_flops_that_are_spent(run, tmp_path):
    """If a token costs 6 N (1 + 0.6 (1e5/N)^0.3), the optimum of a budget is the best of 20,001 sizes that spend it;
    Eq. 4 is a tenth off. Both exponents are shown."""
    write_sweep(tmp_path, sweep(noise=0, physical=0.6), curves=False)
    out, N = run(tmp_path, *QUICK, "--budget", "1e12", "6.4e13", checks=False), np.geomspace(1e3, 1e9, 20_001)
    found, best = read(tmp_path / "fit")["approach3"], []
    for one in found["optima"]:
        D = one["flops"] / (6 * N * (1 + 0.6 * (1e5 / N) ** 0.3))
        best.append(N[np.argmin(loss(N, D))])
        assert one["params"] == pytest.approx(best[-1], rel=2e-3) and best[-1] > 1.05 * optimal(one["flops"] / 1.6)[0]
        assert one["tokens"] == pytest.approx(D[np.argmin(loss(N, D))], rel=2e-3)
    a = np.log(best[1] / best[0]) / np.log(64)
    assert found["frontier"]["a"] == pytest.approx(a, abs=2e-3) and found["a"] == pytest.approx(0.37 / 0.7, abs=1e-6)
    assert f"a = {found['frontier']['a']:.3f} [" in out and "Eq. 4, for 6ND, gives 0.529" in out


def test_answers_by_hand():
    """The cost of a loss, the optimum with inference and the optimum with limited text, by trying 20,001 sizes."""
    best = analysis_of(sweep(noise=0)).best
    C, served = 3e13, 4e10
    found = answer(best, Questions((C,), target_loss=loss(*optimal(C)), inference_tokens=served, unique_tokens=1e20))
    assert found.to_reach[0].found["least_flops"].value == pytest.approx(C, rel=1e-5)
    N = np.geomspace(1e3, 1e9, 20_001)
    least = loss(*optimal(C)) - LAW["E"] - LAW["A"] / N ** LAW["alpha"]
    D = np.where(least > 0, (LAW["B"] / np.maximum(least, 1e-9)) ** (1 / LAW["beta"]), np.inf)
    at = np.argmin(6 * N * D + 2 * N * served)
    serve = {name: one.value for name, one in found.to_serve[0].found.items()}
    assert serve["params"] == pytest.approx(N[at], rel=2e-3) and serve["tokens"] == pytest.approx(D[at], rel=5e-3)
    plain = C + 2 * optimal(C)[0] * served
    assert serve["compute_saved"] == pytest.approx(1 - (6 * N * D + 2 * N * served)[at] / plain, abs=1e-3)
    text = found.with_text[0].found  # more than enough of it
    assert text["epochs"].value == 1 and text["tokens"].value == pytest.approx(optimal(C)[1], rel=1e-3)


def test_answers_on_the_terminal_and_in_the_file(run, made_up, tmp_path):
    """The same numbers on the terminal and in laws.json; the 95% interval contains the 80% one and the value; a loss
    below E gets a reason."""
    asked = ("--budget", "1e13", "1e14", "--target-loss=1.4", "--inference-tokens=1e9", "--unique-tokens=1e6")
    asked += ("--loss-at", "123e3", "45e6")
    out = run(made_up, *QUICK, *asked, "--out", tmp_path)
    found = read(tmp_path)
    assert found["answers"]["approach"] == 3
    for name, rows in (("to_reach", 1), ("to_serve", 2), ("with_text", 2), ("loss_at", 1)):
        assert len(found["answers"][name]) == rows
        for one in found["answers"][name]:
            assert count(one["params"]) in out and count(one["tokens"]) in out
    for number in (1, 2, 3):
        optima = found[f"approach{number}"]["optima"]
        assert [one["flops"] for one in optima] == [1e13, 1e14]
        for one in [*optima, *found["answers"]["to_reach"], *found["answers"]["to_serve"]]:
            for name, (low, high) in one["ci"].items():
                inner = one["ci80"][name]
                assert low <= inner[0] <= inner[1] <= high and low <= one[name] * 1.001 and one[name] <= high * 1.001
    assert {"params", "tokens", "tokens_per_param", "loss"} == set(found["approach3"]["optima"][0]["ci"])
    (at,), law = found["answers"]["loss_at"], laws.load_law(tmp_path / "laws.json")
    assert at["loss"] == pytest.approx(law.loss(123e3, 45e6)) and at["ci"]["loss"][0] < at["loss"] < at["ci"]["loss"][1]
    table = run(made_up, *QUICK, *asked, "--format=markdown", "--out", tmp_path, checks=False)
    assert f"| 123k | 45M | {at['loss']:.4f} | [" in table and table.count("\n|---|") == 7
    assert "parameters and tokens in turn" in run(made_up, "--loss-at", "1e6", code=2)
    out = run(made_up, *QUICK, "--target-loss=0.5", "--out", tmp_path)
    assert "no compute reaches it" in out and "no compute" in read(tmp_path)["answers"]["to_reach"][0]["reason"]


def test_checks_stand_in_the_file(run, made_up, tmp_path):
    """All of them, with intervals, as have all approaches; checks that could not be run have a reason."""
    run(made_up, *QUICK, "--out", tmp_path)
    laws_json = read(tmp_path)
    found, second = laws_json["checks"], laws_json["approach2"]
    for number in (1, 2, 3):
        one = laws_json[f"approach{number}"]
        assert {"a", "b"} < set(one["ci"]) == set(one["ci80"]) and one["bootstrap"]["units"] == 28
        assert all(one["ci"][k][0] <= one["ci80"][k][0] < one["ci80"][k][1] <= one["ci"][k][1] for k in one["ci"])
    assert found["runs"] == 28 and set(found["counts"]) == {"total", "non_embedding", "with_head"}
    held = found["hold_out"]
    below, above = (np.less(held["observed"], held["low"]), np.greater(held["observed"], held["high"]))
    assert held["outside"] == int(np.sum(below | above)) and len(held["rows"]) == 7
    assert held["minima"][0]["ci"][0] < held["minima"][0]["params_predicted"] < held["minima"][0]["ci"][1]
    for one in (*found["leave_out_highest"], *found["delta"], *found["other"], *found["near_minimum"]):
        assert all(one["ci"][name][0] <= one[name] * 1.001 for name in ("A", "B", "E", "a"))
    for how in found["counts"].values():
        for one in how.values():
            assert one["a_ci"][0] < one["a"] < one["a_ci"][1]
    assert "has 0, tried at" in found["kaplan_procedure"]["reason"] and found["kaplan_form"]["alpha_N"] > 0
    assert all(one["ci"]["share"] > 0.5 for one in second["budgets"] if one["bracketed"])


def test_narrow_clusters_are_no_budgets():
    """Without a column of budgets, a cluster of C whose sizes span a factor of 3 is a doubt."""
    rows = sweep(noise=0.001)
    for row in rows:
        del row["budget"]
    narrow = [row for row in rows[21:] if 0.5 < row["params"] / rows[24]["params"] < 2]
    analysis = analysis_of(rows[:21] + narrow)
    found, wide = checks_module.budgets(analysis), checks_module.budgets(analysis_of(rows))
    assert wide.status == "ok" and "4 clusters of C are used instead" in wide.sentence
    without = analysis.results[2].fit.without(analysis.results[2].fit.budgets[-1:]).a
    assert found.status == "doubt" and f": {len(narrow)} runs); without these a is {without:.3f}." in found.sentence


def test_many_rows_have_fewer_resamples(run, made_up, tmp_path, monkeypatch):
    """Beyond WORK, unless --bootstrap is given; a note says so first and among the findings."""
    monkeypatch.setattr(analysis_module, "WORK", 28 * 300)
    monkeypatch.setattr(fit, "QUICK", 0)
    out = run(made_up, "--figures=none", "--out", tmp_path, checks=False)
    assert out.startswith("28 rows: 300 resamples instead of 4000")
    assert out.count("300 resamples instead of 4000") == 2 and read(tmp_path)["meta"]["bootstrap"] == 300
    assert "instead of" not in run(made_up, "--bootstrap=310", "--figures=none", "--out", tmp_path, checks=False)


def test_name_of_the_flops(run, tmp_path):
    """A column flops without our other counts may have any convention: titles say so, unless --flops=physical."""
    rows = sweep(physical=0.5)
    for row in rows:
        del row["flops_6nd"]
    write_sweep(tmp_path, rows, curves=False)
    for name, option in (("as in the column flops", ()), ("physical", ("--flops=physical",))):
        assert f"(N total, C {name})" in run(tmp_path, *QUICK, *option, checks=False)
        assert f"C {name}" in (tmp_path / "fit" / "report.html").read_text()
        assert laws.load_law(tmp_path / "fit" / "laws.json", 2).flops_convention == "physical"
        assert read(tmp_path / "fit")["meta"]["flops_name"] == name


def test_rows_that_are_not_independent():
    """A doubt if rows of one run are resampled separately; a column run resamples copies together."""
    rows = sweep(noise=0.002)
    copies = [*rows, *rows[:5]]
    in_pairs = [row | {"run": f"run {i // 2}"} for i, row in enumerate(rows)]
    found = checks_module.independence(analysis_of(in_pairs, cluster="row"))
    assert found.status == "doubt" and "28 rows belong to 14 runs" in found.sentence
    assert checks_module.independence(analysis_of(copies)).status == "ok"
    found = checks_module.independence(analysis_of([row | {"run": ""} for row in copies]))
    assert found.status == "doubt" and "5 rows are identical" in found.sentence


def test_approach_2_can_answer_alone(tmp_path, run):
    """Approach 3 is not identified: the reason is in laws.json and on the terminal, and Approach 2 answers."""
    rows = sweep(noise=0)
    for row in rows:  # parabolas in log N, not explained by a power law
        N, _ = optimal(row["budget"])
        row["loss"] = 3 + 0.05 * np.log(row["params"] / N) ** 2 + 0.01 * np.log(row["budget"] / 1e12)
    write_sweep(tmp_path, rows, curves=False)
    out = run(tmp_path, *QUICK)
    found = read(tmp_path / "fit")
    assert found["approach3"] is None and found["approach2"] is not None
    assert found["meta"]["reasons"]["approach3"] and "! Approach 3 gives no law" in out and "approach 2* " in out
    with pytest.raises(UserError, match="no law"):
        laws.load_law(tmp_path / "fit" / "laws.json")
    assert (tmp_path / "fit" / "report.html").exists()


def test_without_bootstrap(run, made_up, tmp_path):
    """--bootstrap=0 gives no interval anywhere."""
    out = run(made_up, "--bootstrap=0", "--figures=none", "--out", tmp_path)
    assert "interval" not in out and not read(tmp_path)["approach3"].get("ci")
    assert 'class="ci"' not in (tmp_path / "report.html").read_text().split("<script")[0]


def test_curves_come_from_logs_or_from_a_table(run, made_up, tmp_path):
    """Logs, a CSV, and a curves.csv.gz beside the runs give the same Approach 1. laws.json has the SHA-256 of the
    curves. Without curves there is no Approach 1."""
    lines, points = ["run,params,tokens,loss"], {}
    for row in sweep(physical=0.5):
        for line in (made_up / "runs" / row["run"] / "log.jsonl").read_text().splitlines()[:-1]:
            moment = json.loads(line)
            lines.append(f"{row['run']},{row['params']},{moment['tokens']},{moment['loss']!r}")
        points[row["run"]] = log_points(made_up / "runs" / row["run"])
    (tmp_path / "curves.csv").write_text("\n".join(lines))
    shutil.copy(made_up / "runs.csv", tmp_path / "alone.csv")
    run(made_up, *QUICK, "--out", tmp_path / "logs", checks=False)
    run(tmp_path / "alone.csv", *QUICK, "--curves", tmp_path / "curves.csv", "--out", tmp_path / "table", checks=False)
    (tmp_path / CURVES).write_bytes(to_csv_gz(points))
    run(tmp_path / "alone.csv", *QUICK, "--out", tmp_path / "beside", checks=False)
    (tmp_path / CURVES).unlink()
    run(tmp_path / "alone.csv", *QUICK, checks=False)
    from_logs, from_table = (read(tmp_path / name) for name in ("logs", "table"))
    assert from_logs["approach1"]["a"] == pytest.approx(from_table["approach1"]["a"], rel=1e-9)
    found = read(tmp_path / "beside")
    assert {**found, "meta": None} == {**from_logs, "meta": None}
    assert found["meta"]["curves_sha256"] == hashlib.sha256(to_csv_gz(points)).hexdigest()
    alone = read(tmp_path / "fit-alone")
    assert alone["approach1"] is alone["meta"]["curves_sha256"] is None
    assert "curves" in alone["meta"]["reasons"]["approach1"]


def test_curves_are_of_runs_and_of_numbers(run, made_up, tmp_path):
    """A run with several rows has one curve; points without a loss are left out."""
    clean = write_sweep(tmp_path / "clean", sweep(physical=0.5))
    log = sorted((clean / "runs").glob("*/log.jsonl"))[5]
    log.write_text('{"step": 1, "tokens": 900, "loss": NaN}\n{"step": 1, "tokens": 9, "loss": "x"}\n' + log.read_text())
    rows = (clean / "runs.csv").read_text().splitlines()
    (clean / "runs.csv").write_text("\n".join([*rows, *rows[1:]]))
    run(made_up, *QUICK, "--out", tmp_path / "a", checks=False)
    run(clean, *QUICK, "--out", tmp_path / "b", checks=False)
    one, other = (read(tmp_path / name)["approach1"] for name in "ab")
    assert other["n_curves"] == one["n_curves"] and other["a_ci"] == one["a_ci"]


def test_figures_of_very_large_runs(run, tmp_path):
    """Beyond 1e25 FLOPs, and counts beyond int64."""
    scale = {"params": 10**13, "tokens": 10**13, "flops": 1e26, "flops_6nd": 10**26, "budget": 1e26}
    big = [row | {name: row[name] * factor for name, factor in scale.items()} for row in sweep()]
    write_sweep(tmp_path, big, curves=False)
    assert "5 figures in SVG" in run(tmp_path, "--bootstrap=0", "--figures=svg", checks=False)


def test_the_order_of_rows_changes_nothing(run, tmp_path):
    """Fits, intervals and checks of shuffled rows are equal to the bit."""
    found = []
    for name, seed in (("a", 0), ("b", 1)):
        rows = [sweep(noise=0.003)[i] for i in np.random.default_rng(seed).permutation(28)]
        write_sweep(tmp_path / name, rows, curves=False)
        run(tmp_path / name, *QUICK, "--bootstrap=50")
        found.append(read(tmp_path / name / "fit"))
        del found[-1]["meta"]
    assert found[0] == found[1]


def test_every_count_of_parameters(run, tmp_path):
    """N is the column of `params`, and C by `flops` 6nd counts all parameters; a missing column is an error."""
    analysis = analysis_of(sweep(), params="non_embedding", flops="6nd")
    rows = sorted(sweep(), key=lambda row: row["params"])
    np.testing.assert_array_equal(analysis.N, [row["params_non_embedding"] for row in rows])
    np.testing.assert_allclose(analysis.C, [row["flops_6nd"] for row in rows], rtol=1e-12)
    (tmp_path / "c.csv").write_text("params,tokens,loss\n" + "".join(f"{i},{i * i},{9 / i}\n" for i in range(1, 9)))
    assert "params_with_head" in run(tmp_path / "c.csv", *QUICK, "--params=with_head", code=2)


def test_tunings_drops_and_bad_lines_are_counted(run, tmp_path):
    """What is left out is counted by reason on the terminal and in laws.json."""
    rows = sweep(noise=0)
    rows += [{**row, "lr": 0.02, "loss": row["loss"] + 0.1} for row in rows[:4]]
    rows.append({**rows[0], "status": "failed", "loss": ""})
    rows.append({**rows[1], "loss": "nan"})
    write_sweep(tmp_path, rows, curves=False)
    run(tmp_path, *QUICK, code=2)
    out = run(tmp_path, *QUICK, "--skip-bad", "--drop=2", checks=False)
    expected = {"failed": 1, "not usable": 1, "worse tunings of a run": 4, "of highest loss": 2}
    assert read(tmp_path / "fit")["meta"]["dropped"] == expected
    (line,) = [line for line in out.splitlines() if line.startswith("! Left out: ")]
    assert all(f" {number} {reason}" in line for reason, number in expected.items())


def test_highest_losses_are_left_out_before_the_table_is_judged(run, tmp_path):
    """Losses at random of half of the runs hide the dependence on N and D; without them a law is found. All left out:
    one line."""
    rows = sweep(noise=0.002)
    for i in range(14):
        rows[2 * i]["loss"] = 9 + (7 * i % 14)
    write_sweep(tmp_path, rows, curves=False)
    assert "does not depend" in run(tmp_path, *QUICK, code=2)
    assert "approach 3" in run(tmp_path, *QUICK, "--drop=14", checks=False)
    assert f"leaves none of the {len(rows)} runs" in run(tmp_path, *QUICK, "--drop=999", code=2)


def test_a_json_list_without_tokens(run, tmp_path):
    """The law comes back from N, C = 6ND and loss under other names, which the error proposes; that D = C / 6N is
    said first."""
    rows = [
        {
            "n_params": row["params"],
            "compute": 6 * row["params"] * row["tokens"],
            "bpb": loss(row["params"], row["tokens"]),
        }
        for row in sweep(noise=0)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    mapping = "params=n_params,loss=bpb,flops=compute"
    assert f"--columns {mapping}?" in run(tmp_path / "a.json", *QUICK, code=2)
    out = run(tmp_path / "a.json", *QUICK, "--columns", mapping, checks=False)
    assert out.startswith("No column tokens: tokens = C / (6 params), with C from the column compute.")
    assert read(tmp_path / "fit-a")["approach3"]["alpha"] == pytest.approx(LAW["alpha"], rel=1e-6)


def test_resampling_units():
    """Cooldowns of one trunk together, other runs and rows without a name separately; --cluster=row: rows."""
    rows = sweep(noise=0.002)
    for i, row in enumerate(rows):
        row |= {"trunk": rows[0]["run"] if 0 < i < 5 else "", "run": row["run"] if i < 20 else ""}
    analysis = analysis_of(rows)
    trunk = np.isin(analysis.N, [row["params"] for row in rows[:5]])
    assert len(set(analysis.unit)) == 28 - 4 and len(set(analysis.unit[trunk])) == 1
    assert analysis_of(rows, cluster="row").unit is None


def test_checks_of_a_clean_sweep():
    """Without noise the held-out budgets are predicted exactly."""
    analysis = analysis_of(sweep(noise=0))
    held = run_checks(analysis)["hold_out"].found
    assert len(held.rows) == 7 and held.error < 1e-7
    np.testing.assert_allclose(held.predicted, analysis.L[held.rows], rtol=1e-6)
    assert held.reach == pytest.approx(BUDGETS[-1] / BUDGETS[-2], rel=1e-3)
    assert optimum(analysis.best, 1e13).found["loss"].value == pytest.approx(loss(*optimal(1e13)), rel=1e-6)


@pytest.mark.parametrize(
    "option, says",
    [
        ("--fixed-e=9", "--fixed-e 9: must be below every loss"),
        ("--bootstrap=3", "--bootstrap 3"),
        ("--columns=N=params", "--columns"),
        ("--unique-tokens=1e300", "--unique-tokens 1e+300"),
    ],
)
def test_bad_options(run, made_up, tmp_path, option, says):
    """One line that names the option, exit code 2, nothing written."""
    assert says in run(made_up, "--figures=none", option, "--out", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_bad_curves(run, made_up, tmp_path):
    """A damaged curves.csv.gz and one of other runs: an error that names the file."""
    (tmp_path / "others.gz").write_bytes(to_csv_gz({"other": [{"step": 1, "tokens": 5, "loss": 3.0}]}))
    (tmp_path / CURVES).write_bytes((tmp_path / "others.gz").read_bytes()[:-9])
    for name in ("others.gz", CURVES):
        assert str(tmp_path / name) in run(made_up, *QUICK, "--curves", tmp_path / name, code=2)
    shutil.copy(made_up / "runs.csv", tmp_path)
    assert str(tmp_path / CURVES) in run(tmp_path, *QUICK, code=2)


def test_runs_without_any_law(run, tmp_path):
    """Losses that rise with size: the reason of every approach, nothing written."""
    grid = [(10 ** (3 + i % 5), 10 ** (6 + i // 5)) for i in range(20)]
    lines = [f"{N},{D},{4 + 0.5 * np.log10(N) - 0.02 * np.log10(N) ** 2 - 0.45 * np.log10(D)}" for N, D in grid]
    (tmp_path / "runs.csv").write_text("params,tokens,loss\n" + "\n".join(lines))
    said = run(tmp_path / "runs.csv", *QUICK, code=2)
    assert all(said.count(f"Approach {number}") == 1 for number in (1, 2, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]


def test_an_e_driven_by_the_ends_is_a_doubt():
    """If the losses at the ends of the isoFLOP curves are above the law, they drive E."""
    assert sensitivity.near_minimum(analysis_of(sweep(noise=0.001), bootstrap=100)).status == "ok"
    rows = sweep(noise=0.001)
    for row in rows:
        off = abs(np.log(row["params"] / optimal(row["budget"])[0]))
        row["loss"] *= 1 + 0.04 * max(0, off - np.log(2))
    found = sensitivity.near_minimum(analysis_of(rows, bootstrap=100))
    assert found.status == "doubt" and "depends on models far" in found.sentence
    assert [one["change"] for one in found.json] == ["within 4 times", "within 2.7 times", "within 2 times"]


def test_besiroglu_data(run, tmp_path):
    """The 240 digitised runs give the optimum found elsewhere with 4500 starts and tight tolerances."""
    out = run(chinchilla_csv(tmp_path), "--drop=5", *QUICK, "--out", tmp_path)
    found = read(tmp_path)["approach3"]
    assert found["objective"] == pytest.approx(0.00101827401780, rel=1e-9)
    expected = {"A": 477.826, "B": 2143.417, "E": 1.817218, "alpha": 0.347310, "beta": 0.367172, "a": 0.51390}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-5), name
    assert read(tmp_path)["meta"]["flops_convention"] == "6nd" and "5 of highest loss" in out


def test_checks_of_many_runs_are_made_on_some(monkeypatch):
    """Above MOST_CHECKED runs a sample is checked; the hold-out has indices of the whole; a finding says so."""
    monkeypatch.setattr(checks_module, "MOST_CHECKED", 24)
    analysis = analysis_of(sweep(noise=0.001), bootstrap=40)
    results = run_checks(analysis)
    held = results["hold_out"].found
    assert results["runs"].json == 24 and "24 of the 28 runs" in results["runs"].sentence
    assert all(one["ci"] for one in results["leave_out_highest"].json)
    np.testing.assert_array_equal(held.observed, analysis.L[held.rows])
    assert len(analysis.rows) == 28 and "not checked" not in analysis.rows.dropped


def test_predictions(made_up, run, tmp_path):
    """--trials adds pre-registered predictions to terminal, laws.json and report, and does not change the fit."""
    made = tmp_path / "big"
    made.mkdir()
    row = {"name": "big", "params": 1e5, "tokens": 2e6, "flops": 1.2e12, "loss": 2.5}
    (made / "summary.json").write_text(json.dumps(row))
    predicted = {"predicted_loss": 2.48, "predicted_low": 2.4, "predicted_high": 2.6}
    (made / "config.json").write_text(json.dumps({"identity": {}, "predicted": predicted}))
    run(made_up, "--out", tmp_path / "without", *QUICK)
    said = run(made_up, "--out", tmp_path / "with", "--trials", made, *QUICK)
    assert "0.80% below" in said and "-0.80%" in (tmp_path / "with" / "report.html").read_text()
    without, found = (json.loads((tmp_path / name / "laws.json").read_text()) for name in ("without", "with"))
    assert found.pop("trials")[0]["inside"] is True
    assert {**found, "meta": None} == {**without, "meta": None}
