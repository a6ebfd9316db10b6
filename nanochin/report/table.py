"""Tables of runs: any table with loss and two of params, tokens and FLOPs, read into numpy columns.

    rows = read_rows("runs.csv")            also JSON, JSON lines, a sweep's folder, a folder of runs
    rows["params"], rows["tokens"]          float64 (n,); nan if an optional cell is blank
    rows.labels["run"]                      codes (n,) and their names

A bad cell is an error that names line, column and value, or a counted line (`skip_bad`): a fit to the rest of a damaged
table would look no less certain. Files stream into arrays of doubles, so a million rows take tens of megabytes.
"""

import csv
import hashlib
import json
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

import numpy as np

from nanochin.base.cli import UserError
from nanochin.base.files import read_json
from nanochin.laws.single import CHANCE
from nanochin.laws.solver import MIN_ROWS, MIN_SIZES
from nanochin.report.cells import (
    COLUMNS,
    LABELS,
    NEEDED,
    Names,
    by_6nd,
    find_columns,
    mentioned,
    other_of,
    read_number,
    read_numbers,
    with_flops,
)

TUNING = ("lr", "batch_tokens", "beta2")
SAME = ("kind", "trunk", "tokenizer", "vocab_size", "seq_len", "data_sha", "val_sha", "seed", "schedule")
FAR = 5  # median deviations of the log loss from its median: beyond, losses count as that far in the F-test


@dataclass(frozen=True)
class Labels:
    """A column of words: row i has values[codes[i]]."""

    codes: np.ndarray  # int64 (n,)
    values: tuple[str, ...]

    def __getitem__(self, i: int) -> str:
        return self.values[self.codes[i]]

    def used(self) -> list[str]:
        """The values that occur, without blank."""
        return [self.values[code] for code in np.unique(self.codes) if self.values[code]]

    def alphabetical(self) -> np.ndarray:
        """Codes (n,) in alphabetical order of the values; `codes` are in the order of the file."""
        rank = {value: i for i, value in enumerate(sorted(self.values))}
        return np.array([rank[value] for value in self.values], int)[self.codes]


@dataclass(frozen=True)
class RunTable:
    """n runs (or points of curves) as columns, their source, and what was left out."""

    source: str
    sha256: str
    numbers: dict[str, np.ndarray]
    labels: dict[str, Labels]
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    blanks: dict[str, str] = field(default_factory=dict)  # column with a blank cell -> the place of the first
    notes: tuple[str, ...] = ()  # sentences on how the file was read

    def __len__(self) -> int:
        return len(self.numbers["loss"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.numbers[name]

    def get(self, name: str) -> np.ndarray | None:
        return self.numbers.get(name)

    def complete(self, name: str) -> np.ndarray | None:
        """The column if it exists and has no blank cell."""
        column = self.numbers.get(name)
        return None if column is None or np.isnan(column).any() else column

    def keep(self, mask: np.ndarray, reason: str) -> "RunTable":
        """The rows where `mask` is true; the others are counted under `reason`."""
        lost = int(np.count_nonzero(~mask))
        return replace(self.take(mask), dropped={**self.dropped, reason: lost}) if lost else self

    def take(self, index: np.ndarray) -> "RunTable":
        """The rows that `index` selects, as in numpy."""
        numbers = {name: column[index] for name, column in self.numbers.items()}
        labels = {name: Labels(column.codes[index], column.values) for name, column in self.labels.items()}
        return replace(self, numbers=numbers, labels=labels)

    def in_order(self) -> "RunTable":
        """By the numbers in the rows: nothing may depend on the order in the file."""
        names = [self.labels[name].alphabetical() for name in sorted(self.labels, reverse=True)]
        first = [self.numbers[name] for name in reversed(NEEDED) if name in self.numbers]
        return self.take(np.lexsort((*names, *(self.numbers[name] for name in sorted(self.numbers)), *first)))


# ---------------------------------------------------------------------------------------------------------------------
# From a path to rows


def read_rows(path: str | Path, columns: dict[str, str] | None = None, skip_bad: bool = False) -> RunTable:
    """The runs of a CSV or JSON file, or of a folder: its runs.csv, else the summary.json of every run in it.

    `columns` maps our names to the file's. If params or tokens are missing but FLOPs (or else budgets) are there,
    C = 6ND gives them, and a note says so. Runs whose status is neither finished nor blank are left out and counted.
    Raises UserError with file, line, column and value for a bad line; with `skip_bad` it is left out and counted."""
    path, columns = Path(path), columns or {}
    if path.is_dir() and not (path / "runs.csv").exists():
        return _read_summaries(path, columns, skip_bad)
    return _read_file(path / "runs.csv" if path.is_dir() else path, NEEDED, columns, skip_bad)


def read_curves(path: str | Path, columns: dict[str, str] | None = None, skip_bad: bool = False) -> RunTable:
    """Training curves, many rows per run (`run`, `params`, `tokens`, `loss`), ordered by run and tokens. `columns` are
    those of the runs; if one is missing here, our name is read."""
    return by_run(_read_file(Path(path), (*NEEDED, "run"), columns or {}, skip_bad))


def by_run(points: RunTable) -> RunTable:
    """Points of training curves, ordered by run and tokens."""
    return points.take(np.lexsort((points["tokens"], points.labels["run"].codes)))


# ---------------------------------------------------------------------------------------------------------------------
# Choosing rows


def all_or_no_flops(rows: RunTable, skip_bad: bool = False) -> RunTable:
    """If only some rows have FLOPs, leaves out those without (`skip_bad`) or raises UserError: 6ND in their place would
    mix two conventions."""
    flops = rows.get("flops")
    if flops is None or not (blank := np.isnan(flops)).any():
        return rows
    if skip_bad:
        return rows.keep(~blank, "without flops")
    what_to_do = "fill it in, pass `skip_bad` to leave such rows out, or `flops` 6nd"
    raise UserError(f"{rows.source}: {rows.blanks['flops']}: flops is blank, but other rows have it; {what_to_do}")


def best_tuning(rows: RunTable) -> RunTable:
    """Of rows that differ only in learning rate, batch or beta2, those with the lowest loss.

    Tokens may differ by 1%, since a run ends on a whole step of its batch. Rows that differ in anything in `SAME` are
    different runs."""
    varied = [rows.labels[name].codes for name in TUNING if name in rows.labels]
    if not varied or not len(rows):
        return rows
    same = [rows["params"], *(rows.labels[name].codes for name in SAME if name in rows.labels)]
    if "horizon" in rows.numbers:  # length of the cosine / length of the run: above 1 it overshoots
        same.append(np.round(np.nan_to_num(rows["horizon"] / rows["tokens"]), 2))
    # A number for each row, equal for rows that are equal in all columns.
    tuning, alike = (np.unique(columns, axis=1, return_inverse=True)[1].ravel() for columns in (varied, same))

    order = np.lexsort((rows["tokens"], alike))
    new, fewest, group = np.empty(len(rows), bool), 0.0, None
    for i, (tokens, like) in enumerate(zip(rows["tokens"][order].tolist(), alike[order].tolist(), strict=True)):
        new[i] = like != group or tokens > 1.01 * fewest  # of the group, so that neighbours do not chain
        if new[i]:
            fewest, group = tokens, like
    run = np.empty(len(rows), int)
    run[order] = np.cumsum(new) - 1  # rows with one number are one run in several tunings

    by_loss = np.lexsort((rows["loss"], run))
    best = by_loss[np.unique(run[by_loss], return_index=True)[1]]  # the row with the lowest loss of each run
    return rows.keep(tuning == tuning[best][run], "worse tunings of a run")


def without_highest(rows: RunTable, count: int) -> RunTable:
    """Leaves out the `count` rows of highest loss; of equal ones, the first in the table. Raises UserError if none is
    left."""
    if count and count >= len(rows):
        raise UserError(f"`drop` {count}: leaves none of the {len(rows)} runs in {rows.source}")
    return rows.keep(np.argsort(np.argsort(-rows["loss"], kind="stable")) >= count, "of highest loss")


def require_usable(rows: RunTable) -> None:
    """Raises UserError if the rows cannot identify a law: too few, too few sizes, a single budget, losses that cannot
    be compared or that depend on nothing."""
    left_out = ", ".join(f"{count} {reason}" for reason, count in rows.dropped.items())
    who = f"{rows.source} (left out: {left_out})" if left_out else rows.source
    if len(rows) < MIN_ROWS:
        raise UserError(f"{who}: {len(rows)} usable runs; a law of five constants needs at least {MIN_ROWS}")
    for name in ("params", "tokens"):
        if (different := len(np.unique(rows[name]))) < MIN_SIZES:
            raise UserError(f"{who}: a law needs at least {MIN_SIZES} different values of {name}, not {different}")
    C = 6 * rows["params"] * rows["tokens"]
    if C.max() < 1.1 * C.min():
        raise UserError(f"{who}: all runs have one budget, 6ND = {C.mean():.3g}; a law needs at least two")
    require_comparable(rows, who)
    if min(by_chance(rows["params"], rows["tokens"], rows["loss"])) > CHANCE:
        raise UserError(f"{who}: the loss does not depend significantly on params or tokens (F-test, p > {CHANCE})")


def require_comparable(rows: RunTable, who: str) -> None:
    """Raises UserError for losses of several tokenizers or validation sets."""
    for name in ("tokenizer", "vocab_size", "val_sha"):
        if name in rows.labels and len(used := rows.labels[name].used()) > 1:
            values = f"{len(used)} different {name} ({used[0][:12]}, {used[1][:12]})"
            raise UserError(f"{who}: {values}: losses cannot be compared; fit each separately")


def by_chance(N: np.ndarray, D: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    """(p of N, p of D), F-test: the probability that a parabola in log N improves the fit of log loss by one in log D
    as much if the loss does not depend on N; and vice versa. 0 if unknown: D is a power of N, or too few runs."""
    from scipy.special import fdtrc

    n, d = (np.log(values) - np.log(values).mean() for values in (N, D))
    n, d = (x / (np.abs(x).max() or 1) for x in (n, d))
    # A run that diverged, or a misprint, must not decide: it is moved towards the fit of least absolute residuals.
    y, weight = np.log(loss), np.ones(len(loss))
    terms = np.stack([np.ones_like(y), n, n * n, d, d * d], axis=1)
    for _ in range(30):
        fitted = terms @ np.linalg.lstsq(terms * weight[:, None], y * weight)[0]
        weight = np.fmax(np.abs(y - fitted), 1e-9) ** -0.5
    far = FAR * np.median(np.sort(np.abs(y - fitted))[5:]) if len(y) > 5 else np.inf  # five residuals are 0
    y = np.clip(y, fitted - far, fitted + far)

    def left(*terms: np.ndarray) -> tuple[float, int]:
        A = np.stack([np.ones_like(y), *terms], axis=1)
        found, _, rank, _ = np.linalg.lstsq(A, y)
        return float(np.sum((y - A @ found) ** 2)) + len(y) * 1e-28, rank  # at least rounding errors

    both, rank = left(n, n * n, d, d * d)
    free = len(y) - 5
    if rank < 5 or free < 1:
        return 0.0, 0.0
    return tuple(float(fdtrc(2, free, (left(*terms)[0] / both - 1) / 2 * free)) for terms in ((d, d * d), (n, n * n)))


# ---------------------------------------------------------------------------------------------------------------------
# Files

Table = Iterator  # the header, then (place, cells) of each row


def _read_file(path: Path, needed: Names, columns: dict[str, str], skip_bad: bool) -> RunTable:
    try:
        with open(path, "rb") as file:
            start = file.read(1 << 16)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
        if not start:
            raise UserError(f"{path}: empty; expected a header with {','.join(needed)}, then one line per run")
        if b"\0" in start or start[:2] in (b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b"):
            raise UserError(f"{path}: not text in UTF-8; expected CSV or JSON with {', '.join(needed)}")
        with open(path, encoding="utf-8-sig", newline="") as file:
            if start.startswith((b"[", b"{")):
                table = _table_of_objects(lambda: _json_objects(path, file, start.startswith(b"[")))
            else:
                table = _csv(path, file, needed, columns)
            return _collect(str(path), sha256, table, needed, columns, skip_bad)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8 (byte {error.object[error.start]:#x}); convert it") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _csv(path: Path, file: TextIO, needed: Names, columns: dict[str, str]) -> Table:
    """The delimiter is the comma, semicolon, tab or bar that finds most columns in the header."""
    first = next((line for line in file if line.strip()), "")
    wanted = {*COLUMNS, *columns.values()}

    def found(delimiter: str) -> tuple[int, int]:
        names = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
        return len(wanted.intersection(names)), len(names)

    reader = None
    try:
        delimiter = max(",;\t|", key=found)
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = [name.strip() for name in next((cells for cells in reader if cells), [])]
        if not any(math.isnan(read_number(name)) for name in header):
            raise UserError(f"{path}: the first line has only numbers; add a header, such as {','.join(needed)}")
        yield header
        for cells in reader:
            if any(cells):
                yield f"line {reader.line_num}", cells
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num if reader else 1}: not CSV: {error}") from None


Objects = Iterable[tuple[str, dict]]  # (place, object)


def _table_of_objects(read: Callable[[], Objects]) -> Table:
    """A column for each key. The objects are read twice: any of them may be the first with a key."""
    header = list(dict.fromkeys(key for _, item in read() for key in item))
    yield header
    for place, item in read():
        yield place, ["" if item.get(name) is None else str(item[name]) for name in header]


def _json_objects(path: Path, file: TextIO, is_list: bool) -> Objects:
    """The objects of a list, or one per line."""

    def parsed(place: str, text: str):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            what = "expected a list of objects, or an object per line"
            raise UserError(f"{path}: {place}: not JSON ({error}); {what}") from None

    file.seek(0)
    if is_list:
        items = ((f"item {i}", item) for i, item in enumerate(parsed("a list", file.read()), 1))
    else:
        items = ((f"line {i}", parsed(f"line {i}", line)) for i, line in enumerate(file, 1) if line.strip())
    for place, item in items:
        if not isinstance(item, dict):
            what = 'expected an object such as {"params": 1e6, ...}'
            raise UserError(f"{path}: {place}: {what}, not {repr(item)[:40]}")
        yield place, item


def _read_summaries(folder: Path, columns: dict[str, str], skip_bad: bool) -> RunTable:
    """The finished runs in `folder` or `folder`/runs."""
    paths = [path for pattern in ("*/summary.json", "runs/*/summary.json") for path in sorted(folder.glob(pattern))]
    if not paths:
        raise UserError(f"{folder}: no runs.csv, and no run with a summary.json there or in runs/")
    objects = [(str(path.relative_to(folder)), read_json(path)) for path in paths]
    sha256 = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    return _collect(str(folder), sha256, _table_of_objects(lambda: objects), NEEDED, columns, skip_bad)


def _collect(source: str, sha256: str, table: Table, needed: Names, columns: dict, skip_bad: bool) -> RunTable:
    """Stream a table into columns; leaves out and counts unfinished runs and, with `skip_bad`, bad lines."""
    header = next(table)
    if "run" in needed:  # curves
        columns = {ours: theirs for ours, theirs in columns.items() if theirs in header}
    # A law of compute alone needs neither params nor tokens.
    only_loss = bool(header) and needed == NEEDED and not mentioned(("params", "tokens"), header, columns)
    needed = ("loss",) if only_loss else needed
    spots = find_columns(source, header, needed, columns)
    derived = [name for name in needed if name not in spots]  # params or tokens, by C = 6ND
    needed = with_flops(needed, spots)
    numeric = {name: i for name, i in spots.items() if name not in LABELS}
    worded = {name: i for name, i in spots.items() if name in LABELS}
    numbers = {name: array("d") for name in (*numeric, *derived)}
    codes, words = {name: array("q") for name in worded}, {name: {} for name in worded}
    status, width, dropped, blanks = spots.get("status"), len(header), Counter(), {}

    for place, cells in table:
        word = cells[status].strip().lower() if status is not None and len(cells) == width else ""
        if word not in ("", "finished"):
            dropped["failed" if word == "failed" else "whose status is not finished"] += 1
            continue
        try:
            row = read_numbers(cells, width, numeric, needed)
            for name in derived:
                row[name] = by_6nd(name, row)
        except ValueError as problem:
            if not skip_bad:
                what, todo = (*problem.args, "correct it")[:2]
                raise UserError(f"{source}: {place}: {what}; {todo}, or pass `skip_bad` to leave it out") from None
            dropped["not usable"] += 1
            continue
        for name, value in row.items():
            numbers[name].append(value)
            if value != value:  # nan
                blanks.setdefault(name, place)
        for name, i in worded.items():
            known = words[name]
            codes[name].append(known.setdefault(_encodable(cells[i].strip()), len(known)))

    arrays = {name: np.array(column) for name, column in numbers.items()}
    filled = {name: v for name, v in arrays.items() if name in {*needed, *derived} or not np.isnan(v).all()}
    if only_loss and filled.keys().isdisjoint(("flops", "budget")):
        find_columns(source, header, NEEDED, columns)  # says what is missing
    labels = {name: Labels(np.array(codes[name]), tuple(words[name])) for name in worded if any(words[name])}
    notes = tuple(
        f"No column {name}: {name} = C / (6 {other_of(name)}), with C from the column {header[spots['flops']]}."
        for name in derived
    )
    return RunTable(source, sha256, filled, labels, dict(dropped), blanks, notes)


def _encodable(text: str) -> str:
    """Half a character, which JSON can escape, could not be printed."""
    return text.encode(errors="replace").decode()
