"""Shared by the tests of the fits: Chinchilla's own runs, if available, and isoFLOP grids made from a known law.

The 245 runs were digitised by Besiroglu et al. 2024 and may not be redistributed here. Tests that need them are skipped
unless NANOCHIN_CHINCHILLA_CSV names data/svg_extracted_data.csv of github.com/epoch-research/analyzing-chinchilla, or a
CSV with the columns params, flops, loss.
"""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from nanochin.laws import BESIROGLU

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "chinchilla_svg_extracted.csv"
COLUMNS = {"Model Size": "params", "Training FLOP": "flops", "loss": "loss"}  # names in the public file
BUDGETS, RATIOS = np.geomspace(1e17, 1e21, 6), np.geomspace(1 / 6, 6, 8)


def chinchilla_csv(folder: Path) -> Path:
    """All 245 runs as a table that fit.py reads, written to `folder`."""
    path = folder / "chinchilla.csv"
    np.savetxt(path, np.stack(chinchilla(245), 1), fmt="%.17g", delimiter=",", header="params,tokens,loss", comments="")
    return path


def chinchilla(rows: int = 240) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D = C / 6N and loss of the runs; 240 leaves out the five of highest loss, as Besiroglu et al. do."""
    path = Path(os.environ.get("NANOCHIN_CHINCHILLA_CSV", SHARED))
    if not path.exists():
        pytest.skip("needs Chinchilla's digitised runs: set NANOCHIN_CHINCHILLA_CSV (see tests/chinchilla.py)")
    with open(path, newline="") as file:
        table = [{COLUMNS.get(k, k): v for k, v in row.items()} for row in csv.DictReader(file)]
    N, C, loss = (np.array([float(row[column]) for row in table]) for column in ("params", "flops", "loss"))
    kept = np.sort(np.argsort(loss, kind="stable")[:rows])
    return N[kept], (C / (6 * N))[kept], loss[kept]


def isoflop_grid(law, budgets, ratios, drift: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D, loss of a law without noise: at each budget N_opt times each ratio; `drift` moves the centre of the grid
    by that factor from the first budget to the last."""
    budgets = np.asarray(budgets)
    centre = law.optimal(budgets)[0] * drift ** (np.arange(len(budgets)) / max(1, len(budgets) - 1))
    N = np.outer(centre, ratios).ravel()
    D = np.repeat(budgets, len(ratios)) / (6 * N)
    return N, D, law.loss(N, D)


def noisy_grid(noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """48 runs of the default law, eight sizes at each of BUDGETS, with normal noise on log loss."""
    N, D, loss = isoflop_grid(BESIROGLU, BUDGETS, RATIOS)
    return N, D, loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss)))
