"""Keep a sweep in results/: the files worth keeping, and a README.md with the result."""

import re
from pathlib import Path

from nanochin.base.console import count
from nanochin.base.files import read_json, versions, write_file, writing
from nanochin.runrow import RunRow, flops_column, params_column, read_csv

KEPT = (".csv", ".gz", ".json", ".html", ".svg")  # of the sweep's own files, without the folders of its runs
PICTURES = ("isoflop.svg", "optimum.svg")  # the README shows the first that exists
FILES = {"runs.csv": "a row a run", "curves.csv.gz": "their training curves", "laws.json": "the fit",
    "report.html": "its report", "plan.csv": "the plan"}  # fmt: skip


def keep(folder: Path, results: Path, command: str) -> None:
    """Copy the KEPT files of a sweep's `folder` to `results` and write its README.md; `command` made the sweep."""
    with writing(results):
        results.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.suffix in KEPT:
            write_file(results / path.name, path.read_bytes())
    found = read_json(results / "laws.json") if (results / "laws.json").exists() else None
    commands = [command, f"python fit.py {results.as_posix()}"]
    rows, files = list(read_csv(results / "runs.csv").values()), {path.name for path in results.iterdir()}
    write_file(results / "README.md", readme(results.name, rows, found, files, commands).encode())
    print(f"{results}: kept")


def readme(name: str, rows: list[RunRow], found: dict | None, files: set[str], commands: list[str]) -> str:
    """The text. `found`: the contents of laws.json, None if these runs gave no law; `files`: those to link."""
    commit = found["meta"]["git"] if found else versions()["git"]
    picture = next((file for file in PICTURES if file in files), None)
    commit = commit[:10] + commit[40:] if commit else "not in git"  # what follows the hash is -dirty
    sha = {key: ", ".join({(getattr(row, key) or "")[:10]: None for row in rows}) for key in ("data_sha", "val_sha")}
    lines = [f"- {line}" for line in (of_runs(rows, found), of_law(found), of_hold_out(found)) if line]
    paragraphs = [
        f"# {name}",
        f"[![{picture.partition('.')[0]}]({picture})](report.html)" if picture else "",
        "\n".join(lines),
        "\n".join(["```sh", *commands, "```"]),
        f"Commit {commit}; SHA-256 of the text {sha['data_sha']}, of the validation set {sha['val_sha']}.",
        ", ".join(f"[{file}]({file}): {what}" for file, what in FILES.items() if file in files) + ".",
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def of_runs(rows: list[RunRow], found: dict | None) -> str:
    """How many runs, and their sizes."""
    meta = found["meta"] if found else {"params_convention": "total", "flops_convention": "physical"}
    columns = params_column(meta["params_convention"]), "tokens", flops_column(meta["flops_convention"])
    done = [row for row in rows if row.status == "finished"]
    N, D, C = ([getattr(row, column) for row in done] for column in columns)
    failed = f" ({len(rows) - len(done)} more failed)" if len(done) < len(rows) else ""
    if not done:
        return f"No run was finished{failed}."
    return (
        f"{len(done)} runs{failed} of {len(set(N))} sizes: {count(min(N))} to {count(max(N))} parameters, "
        f"{count(min(D))} to {count(max(D))} tokens, {power(min(C))} to {power(max(C))} FLOPs "
        f"({meta['flops_convention']})."
    )


def of_law(found: dict | None) -> str:
    """The exponents of the law or approach used for answers."""
    if found is None or "single" in found:
        return "These runs gave no law" + (" of N and D." if found else ".")
    number = found["answers"]["approach"]
    law = found.get("law") or found[f"approach{number}"]
    name = f"Approach {number}" + (f", {law['form']}" if law.get("form") else "")
    law = law.get("frontier", law)  # the exponents in C if that is not 6ND
    ends = law.get("ci") or {}
    a, b = (f"C^{law[k]:.3f}" + (f" [{ends[k][0]:.3f}, {ends[k][1]:.3f}]" if k in ends else "") for k in "ab")
    return f"N grows as {a} and D as {b} by {name}, {'with 95%' if ends else 'without'} intervals."


def of_hold_out(found: dict | None) -> str:
    """The hold-out error on the largest runs."""
    held = found.get("checks", {}).get("hold_out") if found else None
    if not held:
        return ""
    if "reason" in held:
        return f"Hold-out: none ({held['reason']})."
    n = len(held["rows"])
    outside = f"; {held['outside']} of {n} fall outside the predicted 95% interval" if "outside" in held else ""
    error = f"{held['error']:.2%} (median; {held['bias']:+.2%} signed)"
    form = (found.get("law") or {}).get("form")
    return f"Hold-out error of Approach 3{f', {form},' if form else ''} on the {n} largest runs: {error}{outside}."


def power(value: float) -> str:
    """1e+08 -> '1e8'."""
    return re.sub(r"e\+0*", "e", f"{value:.3g}")
