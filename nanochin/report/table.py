"""Tables of runs: any table with params, tokens and loss, read into numpy columns.

    rows = read_rows("runs.csv")            also .jsonl, a sweep's folder, a folder of runs
    rows["params"], rows["tokens"]          float64 (n,); nan if an optional cell is blank
    rows.labels["run"]                      codes (n,) and their names

A bad cell is an error that names line, column and value, or a counted line (`skip_bad`): a fit to the rest of a damaged
table would look no less certain. Files stream into arrays of doubles, so a million rows take tens of megabytes.
"""

import csv
import difflib
import hashlib
import json
import math
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

import numpy as np

from nanochin.base.cli import UserError, did_you_mean
from nanochin.runrow import columns_of

NEEDED = ("params", "tokens", "loss")
OPTIONAL = tuple(name for name in columns_of("number") if name not in NEEDED)
LABELS = columns_of("label")
COLUMNS = NEEDED + OPTIONAL + LABELS
TUNING = ("lr", "batch_tokens", "beta2")
SAME = ("kind", "trunk", "tokenizer", "vocab_size", "seq_len", "data_sha", "val_sha", "seed", "schedule")
ALIASES = {  # for "did you mean", never used silently
    "params": ("n", "n_params", "num_params", "parameters", "model_size", "non_embedding_params"),
    "tokens": ("d", "n_tokens", "num_tokens", "train_tokens", "training_tokens", "data"),
    "loss": ("l", "val_loss", "final_loss", "eval_loss", "test_loss"),
    "run": ("run_id", "run_name", "name", "id"),
}

LOOK_AHEAD = 1000  # JSON objects whose keys are the columns: the first may be failed runs without a loss
FAR = 5  # median deviations of the log loss from its median: beyond, losses count as that far in the F-test
CHANCE = 0.05  # significance level, as for 95% intervals
MIN_ROWS, MIN_SIZES = 6, 3  # one more than the law's constants; three points of a curve


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


@dataclass(frozen=True)
class RunTable:
    """n runs (or points of curves) as columns, their source, and what was left out."""

    source: str
    sha256: str
    numbers: dict[str, np.ndarray]
    labels: dict[str, Labels]
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    blanks: dict[str, str] = field(default_factory=dict)  # column with a blank cell -> the place of the first

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
        names = [self.labels[name].codes for name in sorted(self.labels, reverse=True)]
        numbers = [self.numbers[name] for name in sorted(self.numbers)]
        return self.take(np.lexsort((*names, *numbers, self["loss"], self["tokens"], self["params"])))


# ---------------------------------------------------------------------------------------------------------------------
# From a path to rows


def read_rows(path: str | Path, columns: dict[str, str] | None = None, skip_bad: bool = False) -> RunTable:
    """The runs of a CSV or JSONL file, or of a folder: its runs.csv, else the summary.json of every run in it.

    `columns` maps our names to the file's. Runs whose status is neither finished nor blank are left out and counted.
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


def parse_columns(text: str | None) -> dict[str, str]:
    """'params=N,tokens=D' -> {'params': 'N', 'tokens': 'D'}. Raises UserError for names that are not ours."""
    found = {}
    for pair in text.split(",") if text else []:
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not (equals and ours and theirs):
            raise UserError(f"`columns` {text}: expected pairs such as params=N,tokens=D, not {pair!r}")
        if ours not in COLUMNS:
            hint = did_you_mean(ours, COLUMNS) or f"; ours are {', '.join(COLUMNS)}"
            raise UserError(f"`columns` {text}: unknown column {ours!r}{hint}")
        if ours in found or theirs in found.values():
            raise UserError(f"`columns` {text}: {ours if ours in found else theirs} is given twice")
        found[ours] = theirs
    return found


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
    with np.errstate(over="ignore"):
        C = 6 * rows["params"] * rows["tokens"]
    if not np.isfinite(C).all():
        raise UserError(f"{who}: 6 x params x tokens overflows; are the columns named correctly?")
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

    middle = np.median(np.log(loss))
    far = FAR * np.median(np.abs(np.log(loss) - middle))  # a run that diverged must not decide
    loss = np.exp(np.clip(np.log(loss), middle - far, middle + far))
    n, d, y = (np.log(values) - np.log(values).mean() for values in (N, D, loss))
    n, d = (x / (np.abs(x).max() or 1) for x in (n, d))

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
Names = tuple[str, ...]


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
            raise UserError(f"{path}: not text in UTF-8; expected CSV or JSON lines with {', '.join(needed)}")
        if start.startswith(b"[") and start.lstrip(b"[ \t\r\n").startswith(b"{"):
            raise UserError(f"{path}: a JSON list; expected JSON lines, one object per line")
        with open(path, encoding="utf-8-sig", newline="") as file:
            if start.startswith(b"{"):
                lines = ((f"line {i}", line) for i, line in enumerate(file, 1) if line.strip())
                table = _table_of_objects((place, _json_object(path, place, line)) for place, line in lines)
            else:
                table = _csv(path, file, needed, columns)
            return _collect(str(path), sha256, table, needed, columns, skip_bad)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8 (byte {error.object[error.start]:#x}); convert it") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _csv(path: Path, file: TextIO, needed: Names, columns: dict[str, str]) -> Table:
    """The delimiter is the comma, semicolon, tab or bar that finds most columns in the header."""
    first = next(line for line in file if line.strip())
    wanted = {*COLUMNS, *columns.values()}

    def found(delimiter: str) -> tuple[int, int]:
        names = [name.strip() for name in next(csv.reader([first], delimiter=delimiter))]
        return len(wanted.intersection(names)), len(names)

    reader = None
    try:
        delimiter = max(",;\t|", key=found)
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(cells for cells in reader if cells)]
        if not any(math.isnan(_number(name)) for name in header):
            raise UserError(f"{path}: the first line has only numbers; add a header, such as {','.join(needed)}")
        yield header
        for cells in reader:
            if any(cells):
                yield f"line {reader.line_num}", cells
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num if reader else 1}: not CSV: {error}") from None


def _table_of_objects(objects: Iterator[tuple[str, dict]]) -> Table:
    """The first LOOK_AHEAD objects give the columns; optional ones may also appear later."""
    first = list(islice(objects, LOOK_AHEAD))
    header = list(dict.fromkeys(chain.from_iterable(item for _, item in first)))
    header += [name for name in (*OPTIONAL, *LABELS) if name not in header]
    yield header
    for place, item in chain(first, objects):
        yield place, ["" if item.get(name) is None else str(item[name]) for name in header]


def _json_object(path: Path, place: str, text: str) -> dict:
    try:
        item = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {place}: not JSON: {error}") from None
    if not isinstance(item, dict):
        raise UserError(f'{path}: {place}: expected an object such as {{"params": 1e6, ...}}, not {text[:40]!r}')
    return item


def _read_summaries(folder: Path, columns: dict[str, str], skip_bad: bool) -> RunTable:
    """The finished runs in `folder` or `folder`/runs."""
    paths = [path for pattern in ("*/summary.json", "runs/*/summary.json") for path in sorted(folder.glob(pattern))]
    if not paths:
        raise UserError(f"{folder}: no runs.csv, and no run with a summary.json there or in runs/")
    try:
        texts = [path.read_text(encoding="utf-8") for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder}: a summary.json cannot be read: {error}") from None
    sha256 = hashlib.sha256("".join(texts).encode()).hexdigest()
    objects = (
        (str(path.relative_to(folder)), _json_object(path, "whole file", text))
        for path, text in zip(paths, texts, strict=True)
    )
    return _collect(str(folder), sha256, _table_of_objects(objects), NEEDED, columns, skip_bad)


# ---------------------------------------------------------------------------------------------------------------------
# Cells


def _collect(source: str, sha256: str, table: Table, needed: Names, columns: dict, skip_bad: bool) -> RunTable:
    """Stream a table into columns; leaves out and counts unfinished runs and, with `skip_bad`, bad lines."""
    header = next(table)
    if "run" in needed:  # curves
        columns = {ours: theirs for ours, theirs in columns.items() if theirs in header}
    only_loss = needed == NEEDED and not _mentions(header, columns)  # then with flops or budget: checked at the end
    needed = ("loss",) if only_loss else needed
    spots = _find_columns(source, header, needed, columns)
    numeric = {name: i for name, i in spots.items() if name not in LABELS}
    worded = {name: i for name, i in spots.items() if name in LABELS}
    numbers = [array("d") for _ in numeric]
    codes, words = [array("q") for _ in worded], [{} for _ in worded]
    status, width, dropped, blanks = spots.get("status"), len(header), Counter(), {}

    for place, cells in table:
        word = cells[status].strip().lower() if status is not None and len(cells) == width else ""
        if word not in ("", "finished"):
            dropped["failed" if word == "failed" else "whose status is not finished"] += 1
            continue
        try:
            values = _numbers(cells, width, numeric, needed)
        except ValueError as problem:
            if not skip_bad:
                error = f"{source}: {place}: {problem}; correct it, or pass `skip_bad` to leave it out"
                raise UserError(error) from None
            dropped["not usable"] += 1
            continue
        for column, name, value in zip(numbers, numeric, values, strict=True):
            column.append(value)
            if value != value:  # nan
                blanks.setdefault(name, place)
        for column, known, i in zip(codes, words, worded.values(), strict=True):
            column.append(known.setdefault(cells[i].strip(), len(known)))

    filled = {name: np.array(column) for name, column in zip(numeric, numbers, strict=True)}
    filled = {name: column for name, column in filled.items() if name in needed or not np.isnan(column).all()}
    if only_loss and filled.keys().isdisjoint(("flops", "budget")):
        _find_columns(source, header, NEEDED, columns)  # says what is missing
    labels = {
        name: Labels(np.array(column), tuple(known))
        for name, column, known in zip(worded, codes, words, strict=True)
        if any(known)
    }
    return RunTable(source, sha256, filled, labels, dict(dropped), blanks)


def _numbers(cells: list[str], width: int, numeric: dict[str, int], needed: Names) -> list[float]:
    """The numbers of a row, nan for a blank optional one. Raises ValueError for a bad row."""
    if len(cells) != width:
        raise ValueError(f"{len(cells)} cells where the header has {width}")
    values = [_number(cells[i]) for i in numeric.values()]
    for (name, i), value in zip(numeric.items(), values, strict=True):
        if not 0 < value < math.inf:
            text = cells[i].strip()
            if name in needed or text.lower() not in ("", "nan", "none", "null"):
                raise ValueError(f"{name} is {repr(text)[:40] if text else 'blank'}, expected a finite number above 0")
    return values


def _find_columns(source: str, header: list[str], needed: Names, columns: dict[str, str]) -> dict[str, int]:
    """The position of each of our columns. Raises UserError for one that is missing, or there twice."""
    spots = {}
    for name in COLUMNS:
        theirs = columns.get(name, name)
        times = header.count(theirs)
        if times > 1:
            raise UserError(f"{source}: the header names {theirs!r} {times} times; keep one of these columns")
        if times:
            spots[name] = header.index(theirs)
            if name in needed and (same := [other for other in needed if spots.get(other) == spots[name]])[1:]:
                raise UserError(f"{source}: `columns`: {same[0]} and {same[1]} cannot both be {theirs!r}")
        elif name in columns:
            raise UserError(f"{source}: no column {theirs!r} for `columns` {name}={theirs}; it has {_listed(header)}")
        elif name in needed:
            lower = {there.lower(): there for there in header}
            near = [lower[there] for there in lower if there in ALIASES[name]]
            near += [lower[there] for there in difflib.get_close_matches(name, lower, n=1)]
            what_to_do = f"did you mean `columns` {name}={near[0]}?" if near else f"set `columns` {name}=..."
            raise UserError(f"{source}: no column {name!r} among {_listed(header)}; {what_to_do}")
    return spots


def _mentions(header: list[str], columns: dict[str, str]) -> bool:
    """Whether a table has params or tokens, under some name. If not, it may still give the loss by compute."""
    lower = {name.lower() for name in header}.difference(OPTIONAL, LABELS)
    return any(
        name in columns or not lower.isdisjoint(ALIASES.get(name, ())) or difflib.get_close_matches(name, lower)
        for name in ("params", "tokens")
    )


def _number(text: str) -> float:
    """nan for what is not a number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _listed(header: list[str]) -> str:
    return ", ".join(header[:12]) + (", ..." if len(header) > 12 else "")
