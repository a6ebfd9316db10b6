"""Sweep files for tests, as text."""

PLAIN = {"kind": "isoflop", "data": ["python"], "seq_len": 64, "budgets": [1e10, 1e11], "sizes": 5}
LONG = {"budgets": [1e10, 1e11], "centre": [5e3, 2e4], "models": ["16x1", "16x2", "20x2"]}


def toml(table: dict) -> str:
    def value(v):
        if isinstance(v, bool):
            return str(v).lower()
        return f'"{v}"' if isinstance(v, str) else f"[{', '.join(map(value, v))}]" if isinstance(v, list) else repr(v)

    return "".join(f"{key} = {value(v)}\n" for key, v in table.items())
