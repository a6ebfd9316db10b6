"""What the tests of the fits share: Chinchilla's own runs, if they are there, and grids made from a known law.

The 245 runs were digitised by Besiroglu et al. 2024 and may not be redistributed here. Point NANOCHIN_CHINCHILLA_CSV at
data/svg_extracted_data.csv of github.com/epoch-research/analyzing-chinchilla, or at a CSV with the columns params,
flops, loss: the tests that need them skip otherwise.
"""

import csv
import os
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "chinchilla_svg_extracted.csv"
COLUMNS = {"Model Size": "params", "Training FLOP": "flops", "loss": "loss"}  # as the public file calls them


def chinchilla_csv(folder: Path) -> Path:
    """All 245 runs as a table that fit.py reads, written to `folder`."""
    path = folder / "chinchilla.csv"
    np.savetxt(path, np.stack(chinchilla(245), 1), fmt="%.17g", delimiter=",", header="params,tokens,loss", comments="")
    return path


def chinchilla(rows: int = 240) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D = C / 6N and loss of the runs; 240 leaves out the five of highest loss, as Besiroglu et al. do."""
    path = Path(os.environ.get("NANOCHIN_CHINCHILLA_CSV", SHARED))
    if not path.exists():
        pytest.skip("needs Chinchilla's digitised runs: set NANOCHIN_CHINCHILLA_CSV to data/svg_extracted_data.csv of "
                    "github.com/epoch-research/analyzing-chinchilla")  # fmt: skip
    with open(path, newline="") as file:
        table = [{COLUMNS.get(k, k): v for k, v in row.items()} for row in csv.DictReader(file)]
    N, C, loss = (np.array([float(row[column]) for row in table]) for column in ("params", "flops", "loss"))
    kept = np.sort(np.argsort(loss, kind="stable")[:rows])
    return N[kept], (C / (6 * N))[kept], loss[kept]


def isoflop_grid(law, budgets, ratios, drift: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, D, loss of a law without noise: at each budget N_opt times each ratio; `drift` moves the centre of the grid
    by that factor from the first budget to the last."""
    N, D = [], []
    for i, C in enumerate(budgets):
        centre = law.optimal(C)[0] * drift ** (i / max(1, len(budgets) - 1))
        N += [centre * ratio for ratio in ratios]
        D += [C / (6 * centre * ratio) for ratio in ratios]
    N, D = np.array(N), np.array(D)
    return N, D, law.loss(N, D)
