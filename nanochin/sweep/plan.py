"""The plan of a sweep as a table: plan.csv, and what `--dry-run` prints. No torch."""

from nanochin.base.console import clock, count, format_columns
from nanochin.config import FLOP_CONVENTIONS
from nanochin.sweep.cells import Cell
from nanochin.sweep.spec import Sweep
from nanochin.sweep.store import Queue


def seconds(sweep: Sweep, cell: Cell, cells: list[Cell]) -> float:
    """Estimated time of a cell; for a trunk, with the longest of its cooldowns in `cells`."""
    steps = cell.plan.steps - cell.step
    own = cell.spent / (sweep.spec.throughput or 2e10) + steps * sweep.spec.step_seconds
    waiting = (seconds(sweep, other, []) for other in cells if other.trunk == cell.name)
    return own + max(waiting, default=0.0)


def plan_rows(sweep: Sweep, cells: list[Cell], corpus_tokens: float) -> list[dict]:
    """The rows of plan.csv."""
    rows = []
    for cell in cells:
        plan, params = cell.plan, cell.plan.params
        hours = seconds(sweep, cell, []) / 3600 if sweep.spec.throughput else None
        rows.append({
            "run": cell.name, "kind": "trunk" if cell.is_trunk else cell.kind, "budget": cell.budget,
            "trunk": cell.trunk, "model": str(plan.shape), "params": params.total,
            "params_non_embedding": params.non_embedding, "params_with_head": params.with_head,
            "tokens": plan.tokens, "tokens_per_param": plan.tokens / params.total,
            "epochs": plan.tokens / corpus_tokens, "steps": plan.steps, "batch_tokens": plan.batch_tokens,
            "lr": plan.lr, "warmup_tokens": plan.warmup_tokens, "beta2": plan.beta2, "seed": cell.config.seed,
            "flops_spent": cell.spent, **{f"flops_{key}": plan.flops[key] for key in FLOP_CONVENTIONS}, "hours": hours,
        })  # fmt: skip
    return rows


def plan_table(sweep: Sweep, queue: Queue, cells: list[Cell], corpus_tokens: float, workers: int) -> str:
    """What `--dry-run` prints: a line for each of `cells`, their totals, and the time left for so many workers."""
    spec, store, losses, number = sweep.spec, queue.store, queue.losses, "{:.3g}".format
    columns = {"run": ("run", str), "params": ("N", count), "tokens": ("tokens", count),
               "tokens_per_param": ("D/N", number), "epochs": ("epochs", number), "steps": ("steps", str),
               "batch_tokens": ("batch", str), "lr": ("lr", number), "flops_spent": ("FLOPs", "{:.2e}".format),
               "hours": ("time", lambda hours: clock(3600 * hours) if hours else "?")}  # fmt: skip
    left = [cell for cell in cells if queue.is_open(cell)]
    rows = plan_rows(sweep, cells, corpus_tokens)
    lines = [[*(heading for heading, _ in columns.values()), ""]]
    for cell, row in zip(cells, rows, strict=True):
        state = "" if cell in left else "failed" if losses.get(cell.name, 0) is None else "done"
        lines.append([*(text(row[key]) for key, (_, text) in columns.items()), state])

    runs, open_runs = ([cell for cell in each if not cell.is_trunk] for each in (cells, left))
    spent, to_spend = (sum(cell.spent for cell in each) for each in (cells, left))
    counts = f"{len(runs)} runs, {len(runs) - len(open_runs)} done, {len(open_runs)} to train"
    said = [f"{sweep.name}: {counts}: {to_spend:.3g} of {spent:.3g} FLOPs"]
    if len(open_runs) < len(runs):
        unread = ", by name and options, since the text was not read" if None in store.fingerprints.values() else ""
        said.append(f"done: in {store.folder} or {store.results}{unread}")
    if trunks := len(cells) - len(runs):
        alone = sum(cell.plan.flops["physical"] for cell in runs)
        said.append(f"{trunks} trunks; each run from scratch would be {alone:.3g}, {alone / spent:.2f} times as many")
    if left and spec.throughput:
        one = sum(seconds(sweep, cell, []) for cell in left)
        time = clock(max(one / workers, *(seconds(sweep, cell, left) for cell in left)))  # at least that of the longest
        rate = f"{spec.throughput:g} FLOP/s and {spec.step_seconds:g} s a step ({spec.assumes or 'assumed'})"
        said.append(f"time left: {time} with --workers {workers}, without evaluations; an estimate by {rate}")
    elif left:
        said.append(f"time left: unknown; set throughput in {sweep.path}, the FLOP/s of a worker, such as 12e9")
    said.append(f"text of {count(corpus_tokens)} tokens, seen at most {max(row['epochs'] for row in rows):.2g} times")
    if spec.extend:
        said.append(f"up to {spec.extend_limit} more sizes for a budget whose minimum is at an edge")
    said.append(f"N is total, FLOPs physical; the sweep writes all counts to {store.folder / 'plan.csv'}")
    return format_columns(lines) + "\n\n" + "\n".join(said)
