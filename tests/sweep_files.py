"""Sweep files for tests, as text."""

import json

PLAIN = {"kind": "isoflop", "data": ["python"], "seq_len": 64, "budgets": [1e10, 1e11], "sizes": 5}
LONG = {"budgets": [1e10, 1e11], "centre": [5e3, 2e4], "models": ["16x1", "16x2", "20x2"]}


def toml(table: dict) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
