"""Mutation check: whether the tests catch wrong formulas, wrong data order and unsafe checkpoints.

    python tests/mutate.py              all mutations: some minutes
    python tests/mutate.py plan laws    those of files whose path contains plan or laws

A mutation replaces one piece of text in a temporary git worktree of HEAD and runs the tests that should then fail. Exit
code 1 if one survives, if its old text does not occur exactly once, or if the tests fail without a mutation.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 900  # seconds; a mutation that hangs its tests is caught

# By file: (old text, new text) of each mutation.
MUTATIONS = {
    "nanochin/laws/law.py": [
        ("self.A * N**-self.alpha + self.B * D**-self.beta", "self.A * N**-self.alpha - self.B * D**-self.beta"),
        ("return self.beta / (self.alpha + self.beta)", "return self.alpha / (self.alpha + self.beta)"),
        ("(self.alpha * self.A / (self.beta * self.B)) **", "(self.beta * self.B / (self.alpha * self.A)) **"),
        ("(C / (6 * R)) ** a", "(C / R) ** a"),
        ("(50 - level / 2, 50 + level / 2)", "(100 - level, level)"),
        ("np.maximum(np.log(C / self.largest), 0)", "np.abs(np.log(C / self.largest))"),
        ("(p * self.beta * self.B", "(self.beta * self.B"),
    ],
    "nanochin/laws/parametric.py": [
        ("np.sum(weights * psi * (residual - psi / 2))", "np.sum(weights * psi * residual / 2)"),
        ("np.log(law.loss(surface.N, surface.D)) - np", "-np.log(law.loss(surface.N, surface.D)) + np"),
    ],
    "nanochin/laws/solver.py": [
        ("psi = np.clip(r, -delta, delta)", "psi = np.clip(r, -2 * delta, 2 * delta)"),
        ("np.exp(u1 + alpha * self.centre[0])", "np.exp(u1 - alpha * self.centre[0])"),
    ],
    "nanochin/laws/bootstrap.py": [("counts[:, run_of_row]", "counts[:, np.arange(len(run_of_row)) % m]")],
    "nanochin/laws/isoflop.py": [
        ("vertex = -q / (2 * p)", "vertex = -q / p"),
        ("r - p * vertex * vertex", "r + p * vertex * vertex"),
        ("np.interp(u + self.mean,", "np.interp(u,"),
        ("np.where(used, v, np.nan) for v in _optima", "v for v in _optima"),
        ("np.abs(x - centre) <= math.log(window)", "np.abs(x) <= math.log(window)"),
    ],
    "nanochin/laws/forms.py": [
        ("below = [group < k for k in held]", "below = [group <= k for k in held]"),
        ("form.errors[:-1] for form", "form.errors for form"),
        ("< MARGIN * scores[name]", "< scores[name]"),
    ],
    "nanochin/laws/cost.py": [("1 - self.s * self.q * extra", "1 + self.s * self.q * extra")],
    "nanochin/laws/envelope.py": [("(params < np.nanmax(there, 0))", "(params <= np.nanmax(there, 0))")],
    "nanochin/laws/allocation.py": [
        ("inference_tokens / (3 * D)", "inference_tokens / D"),
        ("-(total / unique - 1) / decay", "-(total / unique) / decay"),
    ],
    "nanochin/plan/flops.py": [
        ("3 * sum(getattr(row, convention)", "2 * sum(getattr(row, convention)"),
        ("T * (T + 1) // 2", "T * (T - 1) // 2"),
        ("(1 if shape.tied else 2)", "2"),
        ("L * 2 * T * C * F * (ups + 1)", "L * 2 * T * C * F * ups"),
        ("appendix_f=L * 3 * H * pairs", "appendix_f=L * 3 * pairs"),
    ],
    "nanochin/plan/rules.py": [
        ("tokens**0.69", "tokens**0.59"),
        ("params**-0.36", "params**-0.46"),
        ("tokens // 20", "tokens // 10"),
        ("batch_tokens <= 262_144", "batch_tokens < 262_144"),
    ],
    "nanochin/plan/ladder.py": [
        ("2 * i / (sizes - 1) - 1", "i / (sizes - 1) - 1"),
        ("(MIN_STEPS - 0.5) * shape.seq_len", "(MIN_STEPS - 50) * shape.seq_len"),
        ("min(candidates, key=score)", "max(candidates, key=score)"),
    ],
    "nanochin/data/windows.py": [
        ("random.permutation(np.arange(windows, dtype=np.uint32))", "np.arange(windows, dtype=np.uint32)"),
        ("int(random.integers(seq_len)) if epoch else 0", "0"),
        ("self.tokens[: T + 1 - head]", "self.tokens[1 : T + 2 - head]"),
        ("tokens[1 : len(tokens)]", "tokens[: len(tokens) - 1]"),
    ],
    "nanochin/data/text.py": [
        ("held = text.ends, text.hashes < limit", "held = text.ends, np.arange(len(text.ends)) * 20 < len(text.ends)"),
    ],
    "nanochin/run/checkpoint.py": [
        ("if found != digests[name]:", "if False:"),
        ("        if theirs != ours:", "        if False:"),
        ("    path.chmod(mode)\n", ""),
        ("                fsync(temp / name)\n", ""),
        ("            fsync(final.parent)\n", ""),
        ("[: -max(keep, 1)]", "[max(keep, 1) :]"),
        ('torch.set_rng_state(saved[OPTIMIZER]["rng"])', "pass"),
    ],
    "nanochin/base/files.py": [
        ("            os.fsync(file.fileno())\n", ""),
        ("and seal != _seal(value)", "and False"),
        ("return kind is bool", "return kind in (bool, int)"),
    ],
    "nanochin/run/folder.py": [
        ('step + ("val_loss" not in row)', "step + 1"),
        ("rows = [row for row in map(_row, lines) if row]", "rows = [row for row in map(json.loads, lines) if row]"),
    ],
    "nanochin/run/optim.py": [("weight_decay if matrices else 0.0", "weight_decay")],
    "train.py": [
        ("batch(step * sequences + share.start", "batch((step - state['step']) * sequences + share.start"),
    ],
    "kernels/reference.py": [
        (".triu(1)", ".triu(2)"),
        ("D**-0.5", "D**-1"),
        ("x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w", "x * x.square().mean(-1, True).rsqrt() * w"),
        ("keep.sum().clamp(min=1)", "len(targets)"),
        ("gate * gate.sigmoid() * up", "up * up.sigmoid() * gate"),
    ],
    "kernels/fallback.py": [
        ("is_causal=True", "is_causal=False"),
        ("(cos, cos, -sin, zero, zero, sin)", "(cos, cos, sin, zero, zero, -sin)"),
        ("*ctx.saved_tensors, ctx.half, -1)", "*ctx.saved_tensors, ctx.half, 1)"),
        ("norm.square() / x.shape[-1] + eps", "norm.square() / x.shape[-1]"),
        ("value=-1 / C", "value=1 / C"),
        ("-kept[:, None]", "-torch.ones_like(kept)[:, None]"),
        ("1 + 2 * z_loss * log_z", "1 + z_loss * log_z"),
    ],
}

# The tests of a file, if not those of the same name.
TESTS = {
    "nanochin/laws/law.py": "tests/laws/test_law.py tests/laws/test_cost.py",
    "nanochin/laws/solver.py": "tests/laws/test_parametric.py",
    "nanochin/laws/allocation.py": "tests/laws/test_allocation.py tests/laws/test_cost.py",
    "nanochin/plan/rules.py": "tests/plan/test_ladder.py",
    "kernels/reference.py": "tests/kernels/test_kernels.py",
    "kernels/fallback.py": "tests/kernels/test_kernels.py",
}


def run_tests(checkout: Path, tests: str) -> str:
    """The first failure, "" if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests.split()]
    # Stale bytecode would hide a mutation of equal length. One thread, as in a worker of pytest-xdist.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"no end within {TIMEOUT} s"
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return (failures or [(done.stdout + done.stderr)[-300:]])[0].split(" - ")[0] if done.returncode else ""


def check(checkout: Path, file: str) -> Iterator[str]:
    """What became of each mutation of a file: caught and by which test, SURVIVED or NOT FOUND."""
    path, module = checkout / file, Path(file.removeprefix("nanochin/"))
    tests, original = TESTS.get(file, f"tests/{module.parent}/test_{module.name}"), path.read_text()
    if failure := run_tests(checkout, tests):
        yield f"FAILED without a mutation: {failure}"
        return
    for old, new in MUTATIONS[file]:
        result = "NOT FOUND exactly once"
        if original.count(old) == 1:
            path.write_text(original.replace(old, new))
            failure = run_tests(checkout, tests)
            path.write_text(original)
            result = f"caught by {failure}" if failure else "SURVIVED"
        yield f"{result}\n    {old.strip()} -> {new.strip() or 'nothing'}"


def main() -> int:
    files = [file for file in MUTATIONS if any(word in file for word in sys.argv[1:] or [""])]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", checkout, "HEAD"], check=True)
        try:
            for file in files:
                for result in check(checkout, file):
                    print(f"{file}: {result}", flush=True)
                    results.append(result)
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", checkout], check=True)
    caught = sum(result.startswith("caught") for result in results)
    print(f"{caught} of {len(results)} caught")
    return 0 if caught == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
