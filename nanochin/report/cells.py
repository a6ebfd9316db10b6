"""Which column of a file is which of ours, and which number a cell holds.

    find_columns("runs.csv", ["N", "D", "loss"], NEEDED, {"params": "N", "tokens": "D"})
    read_count("22.8M"), read_count("1,024,000")        22800000.0, 1024000.0

A column is read under our name or under the one that `columns` gives. Other names are only proposed: one that is close
may be another quantity.
"""

import difflib
import math
import re
import shlex
from collections import Counter
from collections.abc import Collection

from nanochin.base.cli import UserError, did_you_mean
from nanochin.runrow import columns_of

Names = tuple[str, ...]

NEEDED = ("params", "tokens", "loss")
OPTIONAL = tuple(name for name in columns_of("number") if name not in NEEDED)
LABELS = columns_of("label")
COLUMNS = NEEDED + OPTIONAL + LABELS
ALIASES = {  # what others call our columns, the likeliest first; as `_plain` writes them
    "params": "N parameters num_params n_params num_parameters n_parameters param_count parameter_count total_params "
    "total_parameters model_params model_parameters model_size non_embedding_params params_non_embedding",
    "tokens": "D n_tokens num_tokens ntokens tokens_trained trained_tokens train_tokens training_tokens tokens_seen "
    "total_tokens token_count",
    "loss": "L val_loss valid_loss validation_loss eval_loss test_loss final_loss final_val_loss final_eval_loss "
    "loss_val cross_entropy val_bpb bpb bits_per_byte train_loss final_train_loss training_loss",
    "flops": "C compute flop train_flops train_flop training_flops training_flop total_flops num_flops n_flops "
    "train_compute training_compute total_compute flops_6nd",
    "budget": "compute_budget flops_budget flop_budget budget_flops isoflop_budget",
    "run": "run_id run_name name id",
}
ALIKE = 0.88  # of a misspelt name: "parms" and "token", but not "tokens_m", which are millions, nor "tokenizer"

BLANK = ("", "nan", "none", "null", "na", "n/a", "-", "\u2013", "\u2014")  # the last are dashes
RANGE, OF_LOSS = (1e-9, 1e40), (1e-6, 1e4)  # counts may be in billions or trillions; beyond are typing errors
THOUSANDS = {"": 0, "k": 3, "m": 6, "b": 9, "t": 12}
COUNT = re.compile(r"(\d{1,3}(?:,\d{3})+|\d*)(\.\d*)?\s*([kmbt]?)", re.IGNORECASE)
NUMBER_IN_NAME = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?[kmbt]?", re.IGNORECASE)


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
# Columns


def find_columns(source: str, header: list[str], needed: Names, columns: dict[str, str]) -> dict[str, int]:
    """The position of each of our columns that the file has, under our name or that of `columns`. If FLOPs are read
    (`with_flops`) and only budgets are there, these are the FLOPs. Raises UserError for a column that is missing or
    there twice."""
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
    needed = with_flops(needed, spots)
    if "flops" in needed and "budget" in spots:
        spots.setdefault("flops", spots["budget"])
    if missing := [name for name in needed if name not in spots]:
        raise UserError(f"{source}: {_what_is_missing(header, missing, needed, columns)}")
    return spots


def mentioned(names: Names, header: list[str], columns: dict[str, str]) -> bool:
    """Whether the file has one of our columns `names`, under any name."""
    return any(name in columns or _nearest(name, header) for name in names)


def with_flops(needed: Names, there: Collection[str]) -> Names:
    """The `needed` columns; if one of params and tokens is not `there` but FLOPs are, these take its place, since
    C = 6ND gives it."""
    missing = {"params", "tokens"}.intersection(needed).difference(there)
    if len(missing) == 1 and {"params", "tokens"} <= {*needed} and ("flops" in there or "budget" in there):
        return tuple("flops" if name in missing else name for name in needed)
    return needed


def _what_is_missing(header: list[str], missing: list[str], needed: Names, columns: dict[str, str]) -> str:
    """Names the missing columns and proposes a whole `columns` option, or says that the table is wide."""
    pairs, free = dict(columns), [name for name in header if name not in columns.values() and header.count(name) == 1]
    for ours in dict.fromkeys((*needed, "flops", "budget")):
        if ours not in pairs and ours not in header and (near := _nearest(ours, free)):
            pairs[ours] = near
            free.remove(near)
    there = {*pairs, *header}
    there |= {"flops"} if "budget" in there else set()
    unknown = [name for name in with_flops(needed, there) if name not in there]
    if unknown and (wide := _values_as_names(header)):
        how = "with columns params, tokens (or flops) and loss (pandas: melt)"
        return f"a wide table, {', '.join(wide)} are values and not names; write one row per run, {how}"
    option = shlex.quote(",".join(f"{ours}={name}" for ours, name in (pairs | dict.fromkeys(unknown, "...")).items()))
    names = f"no column{'s' * (len(missing) > 1)} {', '.join(missing)}"
    if unknown:
        return f"{names} among {_listed(header)}; set `columns` {option}"
    return f"{names}; did you mean `columns` {option}?"


def _nearest(ours: str, names: list[str]) -> str | None:
    """The one of `names` that means our column: another name of it, or ours misspelt."""
    known = {_plain(name): name for name in reversed(names) if name.isprintable() and not {*",="} & {*name}}
    for alias in (ours, *ALIASES[ours].split()):
        if alias in known:
            return known[alias]
    near = difflib.get_close_matches(ours, [name for name in known if name not in COLUMNS], n=1, cutoff=ALIKE)
    return known[near[0]] if near else None


def _plain(name: str) -> str:
    """'Training FLOPs' -> 'training_flops'. A single letter keeps its case: N is not n, nor D the depth d."""
    return name if len(name) == 1 else re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")


def _values_as_names(header: list[str]) -> list[str]:
    """The first names of a wide table that are values: two numbers, such as budgets, or three that differ in a number,
    such as step_1000. Empty if it is not wide."""
    forms = [NUMBER_IN_NAME.sub("#", name) for name in header]
    form, times = max(Counter(form for form in forms if "#" in form).items(), key=lambda item: item[1], default=("", 0))
    names = [name for name, its in zip(header, forms, strict=True) if its == form]
    return [_short(name) for name in names[:3]] if times >= (2 if form == "#" else 3) else []


def _listed(header: list[str]) -> str:
    return (", ".join(map(_short, header[:12])) or "none") + (", ..." if len(header) > 12 else "")


def _short(name: str) -> str:
    """On one line, whatever a quoted name contains."""
    return "".join(char if char.isprintable() else " " for char in name[:40])


# ---------------------------------------------------------------------------------------------------------------------
# Cells


def in_range(name: str, value: float) -> bool:
    """Whether a count, or a loss, is a possible one."""
    low, high = OF_LOSS if name == "loss" else RANGE
    return low <= value <= high


def read_numbers(cells: list[str], width: int, numeric: dict[str, int], needed: Names) -> dict[str, float]:
    """The numbers of a row, nan for a blank optional one. Raises ValueError for a bad row, with what to do if that is
    not to correct it."""
    if len(cells) != width:
        raise ValueError(f"{len(cells)} cells where the header has {width}")
    values = {}
    for name, i in numeric.items():
        value = values[name] = read_number(cells[i]) if name == "loss" else read_count(cells[i])
        if not in_range(name, value):
            text = cells[i].strip()
            if name in needed or text.lower() not in BLANK:
                _refuse(name, text)
            values[name] = math.nan
    return values


def by_6nd(name: str, row: dict[str, float]) -> float:
    """Params or tokens, whichever `name` is, of a row with the other and its FLOPs. Raises ValueError if that cannot
    be."""
    value = row["flops"] / (6 * row[other_of(name)])
    if not in_range(name, value):
        raise ValueError(f"{name} = flops / (6 {other_of(name)}) is {value:.3g}", "check the unit of the FLOPs")
    return value


def other_of(name: str) -> str:
    return "params" if name == "tokens" else "tokens"


def read_number(text: str) -> float:
    """nan for what is not a number in ASCII; Python would also read digits of other scripts."""
    try:
        return float(text) if text.strip().isascii() else math.nan
    except ValueError:
        return math.nan


def read_count(text: str) -> float:
    """A number, also as 22.8M or as 1,024,000; nan for anything else."""
    value = read_number(text)
    if value == value or not text.isascii() or not (match := COUNT.fullmatch(text.strip())):
        return value
    whole, decimals, suffix = match.groups()
    return read_number(f"{whole.replace(',', '')}{decimals or ''}e{THOUSANDS[suffix.lower()]}")


def _refuse(name: str, text: str) -> None:
    low, high = OF_LOSS if name == "loss" else RANGE
    if re.fullmatch(r"\d+,\d+(e[+-]?\d+)?", text):
        raise ValueError(f"{name} is {text!r}, with a decimal comma", "write decimal points in the whole file")
    shown = repr(text)[:40] if text else "blank"
    raise ValueError(f"{name} is {shown}, expected a number from {low:g} to {high:g}")
