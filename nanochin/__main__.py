"""Commands in addition to train.py, sweep.py and fit.py: python -m nanochin COMMAND ...

    sample     sample text from a run
    evaluate   loss, bits per byte and multiple-choice tasks of runs on any text
    export     export a run for transformers and lm-eval
    ladder     models that fit a compute budget
    flops      FLOPs of a model by operation
    claims     the claims of the paper, as the kept sweeps decide them

python -m nanochin COMMAND --help shows the options.
"""

import importlib
import inspect
import os
import sys

from nanochin import options
from nanochin.base.cli import UserError, did_you_mean, parse, run_command

COMMANDS = {  # the package of its module, which has a `main`, and its options
    "sample": ("run", options.SampleOptions),
    "evaluate": ("run", options.EvaluateOptions),
    "export": ("interop", options.ExportOptions),
    "ladder": ("plan", options.LadderOptions),
    "flops": ("plan", options.FlopsOptions),
    "claims": ("report", options.ClaimsOptions),
}


def main() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in train.py, before torch is imported
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    prog = "python -m nanochin" + f" {name}" * (name in COMMANDS)
    run_command(lambda: run(name, *sys.argv[2:]), prog, only_prints=name not in ("export", "claims"))


def run(name: str, *argv: str) -> None:
    """Run a command. Raises UserError if it fails; on a mistake in `argv`, prints one line and exits with code 2."""
    if name in ("--help", "-h"):
        print(__doc__.strip())
    elif name in COMMANDS:
        package, cls = COMMANDS[name]
        given = parse(cls, list(argv), prog=f"python -m nanochin {name}", description=inspect.getdoc(cls))
        importlib.import_module(f"nanochin.{package}.{name}").main(given)
    else:
        raise UserError(f"unknown command {name}{did_you_mean(name, list(COMMANDS))} (see --help)")


if __name__ == "__main__":
    main()
