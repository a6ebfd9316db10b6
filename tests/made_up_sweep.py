"""A sweep made from a known law, in the format of our own: runs.csv and a folder with a log for each run."""

import csv
import json
from pathlib import Path

import numpy as np

LAW = {"E": 1.1, "A": 24.0, "B": 75.0, "alpha": 0.33, "beta": 0.37}  # of models from 10 thousand to 10 million
BUDGETS = (1e12, 4e12, 1.6e13, 6.4e13)


def loss(N, D):
    return LAW["E"] + LAW["A"] / N ** LAW["alpha"] + LAW["B"] / D ** LAW["beta"]


def optimal(C):
    """(N, D) of lowest loss at 6 N D = C, by trying 20,001 sizes rather than by the formula."""
    N = np.geomspace(1e3, 1e9, 20_001)
    best = N[np.argmin(loss(N, C / (6 * N)))]
    return best, C / (6 * best)


def sweep(noise: float = 0.003, seed: int = 0, physical: float = 0.0, sizes: int = 7) -> list[dict]:
    """Rows of runs.csv: `sizes` sizes about the optimum of each budget. A token costs 6 N (1 + physical (1e5/N)^0.3)
    FLOPs; `noise` is the sd of log loss."""
    draw, rows = np.random.default_rng(seed), []
    for budget in BUDGETS:
        for N in np.round(optimal(budget)[0] * np.geomspace(1 / 5, 5, sizes)):
            per_token = 6 * N * (1 + physical * (1e5 / N) ** 0.3)
            D = round(budget / per_token)
            rows.append({
                "run": f"made-up-{N:.0f}-{D}", "status": "finished", "params": int(N), "tokens": D,
                "loss": float(loss(N, D) * np.exp(noise * draw.normal())), "params_non_embedding": int(0.9 * N) - 500,
                "params_with_head": int(0.95 * N), "flops": per_token * D, "flops_6nd": 6 * N * D, "budget": budget,
                "tokenizer": "bytes", "vocab_size": 256, "data_sha": "d" * 64, "val_sha": "e" * 64, "seed": 0,
                "schedule": "cosine", "lr": 0.01, "batch_tokens": 4096, "beta2": 0.99,
            })  # fmt: skip
    return rows


def write_sweep(folder: Path, rows: list[dict], curves: bool = True, points: int = 60) -> Path:
    """runs.csv in `folder`, and a log.jsonl for each run: the law's loss at each logged step, a little above it until
    the learning rate has decayed."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "runs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    draw, done = np.random.default_rng(1), np.arange(1, points + 1) / points
    for row in rows if curves else ():
        run = folder / "runs" / row["run"]
        run.mkdir(parents=True)
        tokens = done * row["tokens"]
        values = loss(row["params"], tokens) * (1 + 0.02 * (1 - done)) * np.exp(0.002 * draw.normal(size=points))
        log = [{"step": i, "tokens": int(tokens[i]), "loss": float(values[i])} for i in range(points)]
        log.append({"step": points, "val_loss": row["loss"]})
        (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    return folder
