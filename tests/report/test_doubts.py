"""Doubts about tables whose faults are made here; a sound sweep raises none."""

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from chinchilla import BUDGETS, RATIOS, isoflop_grid

from nanochin.base.cli import UserError
from nanochin.laws import BESIROGLU, Choice, Form, fit_isoflop
from nanochin.laws.isoflop import mistuned_cell
from nanochin.report.analysis import Analysis, Settings, analyse
from nanochin.report.doubts import DOUBTS, require_plausible
from nanochin.report.sensitivity import leave_out_highest
from nanochin.report.table import Labels, RunTable, by_chance


def table(N, D, loss, run=None, **numbers) -> RunTable:
    labels = {} if run is None else {"run": Labels(np.arange(len(N)), tuple(run))}
    return RunTable("made up", "", {"params": N, "tokens": D, "loss": loss} | numbers, labels)


def grid(noise: float = 0.002) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    N, D, loss = isoflop_grid(BESIROGLU, BUDGETS, RATIOS)
    return N, D, loss * np.exp(noise * np.random.default_rng(0).standard_normal(len(N)))


def analysis(*columns, **more) -> Analysis:
    """With Approach 3 as the law, since the choice of its form takes most of the time."""
    choice = Choice((), (), (), (), chosen=Form("gamma = 1", None, ()))
    return analyse(table(*columns, **more), settings=Settings(bootstrap=0), choice=choice)


def doubts(found: Analysis) -> dict[str, str]:
    return {name: said for name, doubt in DOUBTS.items() if (said := doubt(found))}


def test_a_sound_sweep_raises_no_doubt():
    N, D, loss = grid()
    assert doubts(analysis(N, D, loss)) == {}
    require_plausible(table(N, D, loss))


def test_logarithms_and_accuracies_are_refused():
    """log10 of N and D; a column that rises with compute."""
    N, D, loss = grid()
    with pytest.raises(UserError, match="params is 6.* to .*logarithms to base 10"):
        require_plausible(table(np.log10(N), np.log10(D), loss))
    with pytest.raises(UserError, match="rises"):
        require_plausible(table(N, D, np.exp(-loss)))
    require_plausible(table(N[:0], D[:0], loss[:0]))  # `require_usable` says that it is empty


def test_units():
    """N in millions; FLOPs in PF-days; a perplexity. Kaplan's FLOPs without embedding vary with N: no doubt."""
    N, D, loss = grid()
    said = doubts(analysis(N / 1e6, D / 1e9, loss))["units"]
    assert said.count("millions or billions") == 2
    assert "C is 1.16e-20 times 6ND" in doubts(analysis(N, D, loss, flops=6 * N * D / 8.64e19))["units"]
    assert "perplexity" in doubts(analysis(N, D, np.exp(loss)))["units"]
    assert "units" not in doubts(analysis(N, D, loss, flops=6 * N * D * (1 + (1e6 / N) ** 0.5)))


def test_equal_rows_with_other_losses():
    """A second evaluation of eight runs, 6% higher, is doubted; seeds that differ by 0.5% are not."""
    N, D, loss = grid()
    for higher, doubted in ((1.06, True), (1.005, False)):
        again = [np.append(x, x[:8]) for x in (N, D)]
        found = doubts(analysis(*again, np.append(loss, higher * loss[:8])))
        assert ("same_runs" in found) == doubted
    assert "8 groups" in doubts(analysis(*again, np.append(loss, 1.06 * loss[:8])))["same_runs"]


def test_checkpoints_taken_for_runs():
    """Six sizes at the same eight token counts, without a column run; with one there is no doubt."""
    N, D = np.repeat(np.geomspace(1e7, 1e9, 6), 8), np.tile(np.geomspace(1e9, 1e11, 8), 6)
    loss = BESIROGLU.loss(N, D)
    assert "6 runs" in doubts(analysis(N, D, loss))["checkpoints"]
    assert "checkpoints" not in doubts(analysis(N, D, loss, run=[f"r{i}" for i in range(48)]))


def test_a_run_that_diverged_is_named():
    """One loss of 10.8: the law stays, the run is named, and the F-test does not call the losses chance."""
    N, D, loss = grid()
    loss[20] = 10.8
    found = analysis(N, D, loss)
    said = doubts(found)["outliers"]
    assert "1 run far" in said and "loss 10.8" in said and "`drop` 1" in said
    assert found.law.law.alpha == pytest.approx(BESIROGLU.alpha, abs=0.03)
    assert max(by_chance(N, D, loss)) < 1e-6


@pytest.mark.parametrize("ends, status", [((0.4, 0.6), "ok"), ((0.6, 0.7), "doubt"), ((0.3, 0.4), "doubt")])
def test_few_runs_that_decide(ends, status):
    """a without the five highest losses, about 0.51, inside and outside of the interval of a."""
    found = analysis(*grid())
    third = replace(found.results[3], boot=Mock(interval=lambda *_: ends))
    result = leave_out_highest(replace(found, results=found.results | {3: third}))
    assert result.status == status and bool(result.sentence) == (status == "doubt")


def test_a_mistuned_size_gives_no_minimum():
    """The four losses of a public table: the third is 9% above its neighbours. A budget with such a size is not used,
    also by resamples, and is named."""
    assert mistuned_cell(np.array([4.6e6, 11.6e6, 28.1e6, 49.5e6]), np.array([1.538, 1.510, 1.663, 1.537])) == 2
    assert mistuned_cell(np.array([4.6e6, 11.6e6, 28.1e6, 49.5e6]), np.array([1.538, 1.510, 1.515, 1.537])) is None
    N, D, loss = grid(0.0)
    loss[8 * 2 + 4] *= 1.1
    found = analysis(N, D, loss)
    assert f"{BUDGETS[2]:.3g} FLOPs" in doubts(found)["mistuned"]
    bad = found.results[2].fit.budgets[2]
    assert not bad.bracketed and len(bad.fitted) == 0
    others = np.arange(48) // 8 != 2
    assert found.results[2].law.a == fit_isoflop(N[others], D[others], loss[others]).law.a
