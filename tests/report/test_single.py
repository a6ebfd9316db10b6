"""Tables that identify no law of N and D: the law of one variable, by fit.py."""

import json

import numpy as np
import pytest
from conftest import read_laws as read

from nanochin.base.cli import UserError
from nanochin.laws import BESIROGLU, load_law

BUDGETS, SIZES = np.geomspace(1e18, 1e21, 7), np.round(np.geomspace(1e7, 3e9, 10))
OF_SIZE = BESIROGLU.E + BESIROGLU.A / 124e6**BESIROGLU.alpha


def write(path, header: str, *columns) -> str:
    np.savetxt(path, np.stack(np.broadcast_arrays(*columns), 1), fmt="%.15g", delimiter=",", header=header, comments="")
    return str(path)


def runs(path, N, D) -> str:
    N, D = np.broadcast_arrays(N, D)
    return write(path, "params,tokens,loss", N, D, BESIROGLU.loss(N, D))


def of_compute(C):
    return BESIROGLU.loss(*BESIROGLU.optimal(C))


@pytest.fixture
def fitted(run, tmp_path):
    """`fitted(path, *options)` -> (output, laws.json) of fit.py."""

    def command(path, *options) -> tuple[str, dict]:
        out = run(path, "--bootstrap=100", "--out", tmp_path / "out", *options)
        return out, read(tmp_path / "out")

    return command


@pytest.mark.parametrize("column", ["flops", "budget", "spent"])
def test_compute_and_loss(fitted, tmp_path, column):
    """By either column, or another named by --columns; lines of JSON too. Of several losses of a budget, the lowest."""
    path = write(tmp_path / "runs.csv", f"{column},loss", [*BUDGETS, BUDGETS[0]], [*of_compute(BUDGETS), 5])
    options = ["--columns=flops=spent"] if column == "spent" else []
    out, found = fitted(path, *options, "--budget", "1e22", "1e24", "--target-loss", of_compute(1e23))
    single = found["single"]
    assert (single["of"], single["n"]) == ("C", 7)
    assert (single["E"], single["c"]) == pytest.approx((BESIROGLU.E, 0.17828649), rel=1e-6)
    assert [one["loss"] for one in single["predictions"]] == pytest.approx(of_compute(np.array([1e22, 1e24])), rel=1e-6)
    assert [one["tested"] for one in single["predictions"]] == [False, False]
    assert single["to_reach"]["C"] == pytest.approx(1e23, rel=1e-4) and out.count("not tested at this distance") == 3
    assert {"K", "ci", "objective", "hold_out", "note"} <= single.keys()
    assert "only 7 independent runs" in out and found["meta"]["dropped"] == {"not the lowest loss of their C": 1}
    lines = [json.dumps({column: C, "loss": of_compute(C)}) for C in BUDGETS]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines))
    again = fitted(tmp_path / "runs.jsonl", *options)[1]["single"]
    assert again["E"] == pytest.approx(single["E"], rel=1e-9)


def test_one_size_and_one_d(fitted, tmp_path):
    """L(D) has the E of the size and beta; L(N) alpha. A loss below E is never reached."""
    D = np.geomspace(1e8, 3e10, 14)
    out, found = fitted(runs(tmp_path / "d.csv", 124e6, D), "--target-loss=2.5")
    assert found["single"]["of"] == "D" and f"falls to E = {OF_SIZE:.6g}" in out
    assert (found["single"]["E"], found["single"]["c"]) == pytest.approx((OF_SIZE, BESIROGLU.beta), rel=1e-6)
    assert "reason" in found["single"]["to_reach"]
    out, found = fitted(runs(tmp_path / "n.csv", SIZES, 1e10), "--budget=1e20")
    assert found["single"]["of"] == "N" and found["single"]["c"] == pytest.approx(BESIROGLU.alpha, rel=1e-6)
    assert "--budget" in out.splitlines()[0]  # has no place in a law of N


@pytest.mark.parametrize("power", [1.0, 1.1])
def test_n_and_d_that_rise_together(fitted, tmp_path, power):
    """D = 20 N with rounding, or a power of N: the loss by C along the line; a point of it is predicted."""
    D = np.round(20 * SIZES**power * (1 + 0.005 * (-1) ** np.arange(10)))
    out, found = fitted(runs(tmp_path / "runs.csv", SIZES, D))
    single = found["single"]
    assert single["of"] == "C" and "cannot be told apart" in out
    assert ("D / N is 20" if power == 1 else "D grows as N^1.1") in out
    C, N = 6 * 20 * SIZES ** (1 + power), SIZES
    law = [single[name] for name in ("E", "K", "c")]
    assert law[0] + law[1] * C ** -law[2] == pytest.approx(BESIROGLU.loss(N, 20 * N**power), rel=2e-3)


def test_what_identifies_no_law_either(run, tmp_path):
    """One line with both reasons. One budget with several sizes, and several budgets, are as before."""
    assert "only 3 different" in run(write(tmp_path / "a.csv", "flops,loss", BUDGETS[:3], [3, 2, 1]), code=2)
    assert "does not fall" in run(write(tmp_path / "a.csv", "flops,loss", BUDGETS, of_compute(BUDGETS)[::-1]), code=2)
    assert "one budget" in run(runs(tmp_path / "b.csv", SIZES, 1e20 / SIZES), code=2)
    assert "params, tokens" in run(write(tmp_path / "c.csv", "size,loss", SIZES, 3), code=2)
    path = write(tmp_path / "d.csv", "flops,loss", BUDGETS, of_compute(BUDGETS))
    assert "leaves none" in run(path, "--drop=7", code=2)
    text = "".join(f"124e6,{D},{BESIROGLU.loss(124e6, D)},{'ab'[int(D > 1e9)]}\n" for D in np.geomspace(1e8, 1e10, 8))
    (tmp_path / "e.csv").write_text("params,tokens,loss,tokenizer\n" + text)
    assert "cannot be compared" in run(tmp_path / "e.csv", code=2)


def test_the_folder_of_its_output(run, fitted, tmp_path):
    """A laws.json of someone else is not overwritten; ours has no law of N and D, and load_law says so."""
    path = runs(tmp_path / "runs.csv", 124e6, np.geomspace(1e8, 3e10, 14))
    fitted(path)
    with pytest.raises(UserError, match="^`law` .*laws.json: .* not of N and D"):
        load_law(tmp_path / "out" / "laws.json")
    (tmp_path / "out" / "laws.json").write_text("mine")
    run(path, "--out", tmp_path / "out", code=2)
    assert (tmp_path / "out" / "laws.json").read_text() == "mine"


def test_the_order_of_rows_changes_nothing(fitted, tmp_path):
    """The same law, intervals and hold-out."""
    D, order = np.geomspace(1e8, 3e10, 14), np.random.default_rng(0).permutation(14)
    found = [fitted(runs(tmp_path / "runs.csv", 124e6, one))[1]["single"] for one in (D, D[order])]
    assert found[0] == found[1]
