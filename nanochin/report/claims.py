"""The claims of the paper, each with a verdict from kept sweeps: python -m nanochin claims

Writes claims.json, README.md and figures to results/claims/. What decides a claim is in rules.py, how it is measured in
effects.py. The sweeps are those of sweeps/ and sweeps/paper/, kept in --results.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nanochin.base.cli import UserError
from nanochin.base.console import Progress, format_columns, markdown
from nanochin.base.files import write_file, write_json, writing
from nanochin.laws import NotIdentified
from nanochin.options import ClaimsOptions
from nanochin.report.claim_figures import FIGURES
from nanochin.report.effects import EFFECTS
from nanochin.report.estimates import Effect, Kept, read_kept
from nanochin.report.panels import svg
from nanochin.report.rules import CLAIMS, NOT_REPRODUCED, REPRODUCED, UNDECIDED, Claim, Rule


@dataclass(frozen=True)
class Decided:
    """A claim, its sweeps, its effects by the keys of its rules, and its verdict. `missing`: why it has no effects."""

    claim: Claim
    effects: dict[str, Effect] = field(default_factory=dict)
    sweeps: tuple[Kept, ...] = ()
    missing: str = ""

    @property
    def figure(self) -> str | None:
        """Name of its figure's file."""
        return f"claim-{self.claim.number}.svg" if self.effects and self.claim.number in FIGURES else None

    def verdict_of(self, key: str) -> str:
        found = self.effects.get(key)
        return self.claim.rules[key].verdict((found.low, found.high)) if found else UNDECIDED

    @property
    def verdict(self) -> str:
        return self.claim.verdict({key: self.verdict_of(key) for key in self.claim.rules})

    def to_json(self) -> dict:
        claim = self.claim
        rows = {
            key: {"effect": rule.effect, "rule": str(rule), "main": rule.main, "verdict": self.verdict_of(key)}
            | (asdict(self.effects[key]) if key in self.effects else {})
            for key, rule in claim.rules.items()
        }
        known = {name: getattr(claim, name) for name in ("number", "title", "source", "sweeps", "reason")}
        return known | {"verdict": self.verdict, "missing": self.missing, "figure": self.figure, "effects": rows}


def decide(claim: Claim, results: Path, read: Callable[[Path], Kept] = read_kept) -> Decided:
    """The claim with its effects, from the sweeps kept in `results`, which `read` reads."""
    if claim.number not in EFFECTS:
        return Decided(claim, missing=claim.reason)
    try:
        sweeps = tuple(read(results / sweep) for sweep in claim.sweeps)
        return Decided(claim, EFFECTS[claim.number](*sweeps), sweeps)
    except (UserError, NotIdentified) as error:
        return Decided(claim, missing=str(error))


def main(options: ClaimsOptions) -> None:
    results = Path(options.results)
    out = Path(options.out or results / "claims")
    found, read = [], functools.cache(read_kept)  # several claims use the same sweeps
    with Progress() as progress:
        for i, claim in enumerate(CLAIMS):
            progress("claims", i, len(CLAIMS), claim.title)
            found.append(decide(claim, results, read))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for one in found:
            if one.figure:
                drawn, _ = svg(FIGURES[one.claim.number](one.effects, *one.sweeps), one.figure)
                write_file(out / one.figure, drawn.encode())
        write_json(out / "claims.json", {"claims": [one.to_json() for one in found]})
        write_file(out / "README.md", readme(found).encode())
    lines = [[str(one.claim.number), one.verdict, one.claim.title] for one in found]
    print(format_columns([["", "verdict", "claim"], *lines]))
    for one in found:
        if one.missing and one.claim.number in EFFECTS:
            print(f"note: claim {one.claim.number}: {one.missing}")
    print(f"\n{out}/README.md, claims.json")


# ---------------------------------------------------------------------------------------------------------------------
# README.md


def readme(found: list[Decided]) -> str:
    counts = ", ".join(f"{sum(one.verdict == v for one in found)} {v}" for v in (REPRODUCED, NOT_REPRODUCED, UNDECIDED))
    rows = [["", "claim", "measured", "verdict"]]
    for one in found:
        number, title = one.claim.number, one.claim.title
        rows.append([str(number), f"[{title}](#claim-{number})", headline(one), f"**{one.verdict}**"])
    rules = (
        "An effect has a 95% interval. If the whole interval is within the rule, the runs agree with the claim; if it "
        "is outside, they do not; else they cannot decide. A claim is reproduced if all its main rules agree, and not "
        "reproduced if one does not. The rules are in "
        "[nanochin/report/rules.py](../../nanochin/report/rules.py), where they stood before the runs of "
        "[sweeps/paper](../../sweeps/paper) were made; a claim's note says what changed after them."
    )
    parts = [
        "# The claims of the paper",
        f"{len(found)} claims of Hoffmann et al. 2022 and of papers about it, as runs of 1e11 to 1e13 FLOPs decide "
        f"them: {counts}. Made from the kept sweeps by `python -m nanochin claims`.",
        markdown(rows).strip(),
        rules,
        *(section(one) for one in found),
    ]
    return "\n\n".join(parts) + "\n"


def headline(one: Decided) -> str:
    """The main effects of a claim, in few words."""
    texts = [show(one.effects[key], rule) for key, rule in one.claim.rules.items() if rule.main and key in one.effects]
    return "; ".join(texts) or one.claim.reason or "not run yet"


def section(one: Decided) -> str:
    claim = one.claim
    lines = [
        f'## <a id="claim-{claim.number}"></a>{claim.number}. {claim.title}',
        f"{claim.source}. **{one.verdict}**.",
    ]
    if claim.sweeps:
        lines[1] += f" Runs: {', '.join(f'[{name}](../{name})' for name in claim.sweeps)}."
    if one.figure:
        lines.append(f"![Measured for claim {claim.number}]({one.figure})")
    if one.missing:
        lines.append(f"{'Not run yet' if claim.number in EFFECTS else 'Why not here'}: {one.missing}.")
    if one.effects:
        rows = [["effect", "measured, 95% interval", "rule", "verdict"]]
        for key, rule in claim.rules.items():
            if effect := one.effects.get(key):
                name = rule.effect.replace("*", r"\*")  # N*
                name = name if rule.main else f"*{name}*"
                text = "; ".join(filter(None, (show(effect, rule), effect.note)))
                verdict = "; ".join(filter(None, (one.verdict_of(key), rule.needed(effect))))
                rows.append([name, text, str(rule), verdict])
        lines.append(markdown(rows).strip())
    lines += [claim.note] if claim.note else []
    return "\n\n".join(lines)


def show(effect: Effect, rule: Rule) -> str:
    """'0.48 [0.45, 0.52]'"""

    def number(x: float) -> str:
        return f"{100 * x:.2f}%" if rule.percent else f"{x:.3g}" if abs(x) >= 10 else f"{x:.3f}"

    if math.isnan(effect.value):
        return "none"
    return f"{number(effect.value)} [{number(effect.low)}, {number(effect.high)}]"
