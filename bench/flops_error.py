"""How far the exact FLOPs of a run are from 6ND: the tables and the figure of docs/flops.md.

python -m bench.flops_error          prints the tables, writes docs/flops_error.png
"""

from bench.common import NoOptions
from nanochin.base.cli import parse, run_command
from nanochin.base.console import markdown
from nanochin.config import FLOP_CONVENTIONS, Shape, make_shape
from nanochin.plan.flops import count_params, flops_per_token

SHAPES = ((16, 1), (32, 2), (64, 3), (128, 3), (256, 4), (512, 8), (768, 12), (1024, 20), (1792, 26))
VOCABULARIES = (256, 8_192, 50_304)
CONTEXTS = (256, 1_024, 4_096)
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00")
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
FIGURE = "docs/flops_error.png"


def ratio(shape: Shape, convention: str = "physical") -> float:
    return flops_per_token(shape, convention) / flops_per_token(shape, "6nd")


def table(tied: bool) -> str:
    """Markdown: shapes down, vocabulary x context across, `physical` / 6ND in the cells."""
    columns = [(V, T) for V in VOCABULARIES for T in CONTEXTS]
    rows = [["shape", *(f"V {V:,} T {T:,}" for V, T in columns)]]
    for width, layers in SHAPES:
        ratios = [ratio(make_shape(width, layers, vocab_size=V, seq_len=T, tied=tied)) for V, T in columns]
        rows.append([f"{width}x{layers}", *(f"{each:.3f}" for each in ratios)])
    return markdown(rows)


def figure(path: str) -> None:
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")

    def plot(axes, V: int, T: int, convention: str, **style) -> None:
        shapes = [make_shape(*size, vocab_size=V, seq_len=T) for size in SHAPES]
        N, ratios = zip(*((count_params(shape).total, ratio(shape, convention)) for shape in shapes), strict=True)
        axes.plot(N, ratios, linewidth=1.2, marker=".", markersize=4, **style)

    for V, style in zip(VOCABULARIES, ("-", "--", ":"), strict=True):
        for T, colour in zip(CONTEXTS, COLOURS, strict=False):
            plot(left, V, T, "physical", linestyle=style, color=colour, label=f"V {V:,}, T {T:,}")
    for convention, colour in zip((c for c in FLOP_CONVENTIONS if c != "6nd"), COLOURS, strict=True):
        plot(right, 8_192, 1_024, convention, color=colour, label=convention)
    left.set(title="physical / 6ND, tied head", ylabel="training FLOPs / (6 x total parameters x tokens)")
    right.set_title("each convention / 6ND, tied head, V 8,192, T 1,024")
    for axes in (left, right):
        axes.axhspan(0.99, 1.10, color="0.9", zorder=0)
        axes.axhline(1, color="0.5", linewidth=0.8, zorder=0)
        axes.set(xscale="log", yscale="log", ylim=(0.02, 25), xlabel="parameters (total)")
        axes.set_yticks(TICKS, map(str, TICKS))
        axes.minorticks_off()
        axes.legend(fontsize=7, frameon=False)
    fig.savefig(path, dpi=100)


def main() -> None:
    parse(NoOptions, prog="python -m bench.flops_error", description=__doc__)
    for tied in (True, False):
        print(f"`physical` / 6ND, {'tied' if tied else 'untied'} head\n{table(tied)}")
    figure(FIGURE)
    print(f"{FIGURE} written")


if __name__ == "__main__":
    run_command(main, "python -m bench.flops_error")
