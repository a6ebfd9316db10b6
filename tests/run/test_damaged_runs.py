"""A file of a run is damaged, then the run is resumed, sampled, evaluated, exported or fitted: each gives one line that
says what is wrong, or the result of the run without damage."""

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import arguments, call, tiny_config
from damage import change
from safetensors.torch import load_file

import fit
import nanochin.__main__
import train
from nanochin.base.files import SEAL, read_json, sha256_of, to_json
from nanochin.run import checkpoint

STEPS = (20, 60, 109)  # of the checkpoints; the stopped run has the first two
COMMANDS = ("sample", "evaluate", "export", "fit")


def call_train(*argv) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "peak_of", lambda *_: (1e11, "as the test says"))
        return call(train.main, *argv)


def command(name: str, run: Path, spare: Path):
    """(exit code, result, stderr) of a command on a run: what it prints, or the weights that it exports."""
    if name == "fit":
        return call(fit.main, run.parent, "--out", spare / "fit", "--figures=none")
    words = {"sample": ["--tokens=20"], "evaluate": ["--data", __file__], "export": [spare / "export"]}[name]
    code, out, err = call(nanochin.__main__.main, name, run, *words)
    if name == "export" and code == 0:
        return code, sha256_of(spare / "export" / "model.safetensors"), err
    return code, out, err


def result(run: Path) -> tuple:
    """Weights, moments and row of a finished run."""
    tensors = [load_file(run / "checkpoints" / f"step-{STEPS[-1]}" / name) for name in checkpoint.DIGESTS]
    bits = [{key: tensor.tolist() for key, tensor in named.items()} for named in tensors]
    return bits, {key: value for key, value in read_json(run / "summary.json").items() if key != "seconds"}


class Reference:
    """A finished run, the same run stopped after step 80, and what each command gives from each checkpoint."""

    def __init__(self, text: Path, cache: Path, folder: Path):
        options = {"name": "run", "seq_len": 64, "batch_tokens": 64, "tokens": 7e3, "log_every": 7, "eval_every": 30,
                   "save_steps": STEPS[:2], "tokenizer": "bpe", "vocab_size": 300}  # fmt: skip
        self.argv = arguments(tiny_config(text, cache, folder / "finished", **options))
        stopped = arguments(tiny_config(text, cache, folder / "stopped", **options))
        self.folder = {name: folder / name / "run" for name in ("finished", "stopped")}
        assert call_train(*self.argv)[0] == 0
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            original, left = train.train_step, iter(range(80))
            patch.setattr(train, "train_step", lambda *args: original(*args) if next(left, None) is not None else 1 / 0)
            call_train(*stopped)
        self.result, self.said = result(self.folder["finished"]), {name: {} for name in COMMANDS}
        for step in STEPS:
            run = folder / str(step) / "run"
            shutil.copytree(self.folder["finished"], run)
            for other in set(STEPS) - {step}:
                shutil.rmtree(run / "checkpoints" / f"step-{other}")
            for name in COMMANDS[:-1]:
                code, self.said[name][step], err = command(name, run, run.parent)
                assert code == 0, err


@pytest.fixture(scope="module")
def reference(text, cache, tmp_path_factory) -> Reference:
    return Reference(text, cache, tmp_path_factory.mktemp("reference"))


# ---------------------------------------------------------------------------------------------------------------------
# Damage: functions of a file (or of a run) and a random.Random


def of_json(how: str, sealed: bool):
    """`change` in a JSON file or a line of a log. Its seal is kept, which then does not fit, or removed."""

    def damage(path: Path, draw: random.Random) -> None:
        if path.suffix == ".jsonl":
            lines = path.read_text().splitlines()
            i = draw.randrange(len(lines))
            lines[i] = json.dumps(change(json.loads(lines[i]), draw, how))
            path.write_text("\n".join(lines) + "\n")
        else:
            value = json.loads(path.read_text())
            seal = value.pop(SEAL)
            path.write_text(json.dumps(change(value, draw, how) | ({SEAL: seal} if sealed else {})))

    return damage


def of_tensors(how: str, matching: bool):
    """In the header of a safetensors file, with its digest in state.json `matching` or not."""

    def damage(path: Path, draw: random.Random) -> None:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        one, two = draw.sample([name for name in header if name != "__metadata__"], 2)
        if how == "swap":
            two = draw.choice([name for name in header if header[name].get("shape") != header[one]["shape"]])
            header[one], header[two] = header[two], header[one]
        elif how == "name":
            header["other"] = header.pop(one)
        else:
            header[one]["shape"] = [1, *header[one]["shape"]]
        packed = json.dumps(header).encode()
        path.write_bytes(len(packed).to_bytes(8, "little") + packed + content[8 + size :])
        if matching:
            state = read_json(path.parent / "state.json")
            state["sha256"][path.name] = sha256_of(path)
            (path.parent / "state.json").write_bytes(to_json(state))

    return damage


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def to_folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def insert(path: Path, draw: random.Random) -> None:
    """A piece that is no JSON, or not UTF-8, at a random place."""
    content, at = path.read_bytes(), draw.randrange(path.stat().st_size)
    path.write_bytes(content[:at] + draw.choice((b"\n", b"\xff\xfe", b"{", b"[" * 5000, b"NaN")) + content[at:])


def copied(path: Path, draw: random.Random) -> None:
    """The checkpoint once more, under a name that no checkpoint has, or the name of another step."""
    name = draw.choice(("step-109-copy", "step-109-old2", "step-0109", "step-٣", "step-300", "step--1", "step-"))
    shutil.copytree(path.parent, path.parent.with_name(name))


ANY = {
    "delete": lambda path, draw: path.unlink(),
    "empty": lambda path, draw: path.write_bytes(b""),
    "truncate": lambda path, draw: path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)]),
    "flip": flip,
    "insert": insert,
    "folder": to_folder,
}
BOTH = (True, False)
JSON = {f"{how}, sealed {kept}": of_json(how, kept) for how in ("type", "remove", "add") for kept in BOTH}
TENSORS = {f"{how}, matching {fits}": of_tensors(how, fits) for how in ("swap", "name", "shape") for fits in BOTH}


def damage(run: Path, draw: random.Random) -> tuple[Path, str]:
    """Damage a random file of a run -> the file and how."""
    path = draw.choice(sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock"))
    ways = dict(ANY)
    if path.suffix.startswith(".json"):
        ways |= JSON
    if path.suffix == ".safetensors":
        ways |= TENSORS
    if path.parent.name.startswith("step-"):
        ways["copied"] = copied
    how = draw.choice(sorted(ways))
    ways[how](path, draw)
    return path.relative_to(run), how


FAST, ALL = 40, 400
SEEDS = [*range(FAST), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(FAST, ALL))]


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_run(reference, tmp_path, one_thread, seed):
    """Each command reads the run, then train.py resumes it: one line on stderr, or the same result."""
    draw = random.Random(seed)
    kind = draw.choice(("finished", "stopped"))
    run = tmp_path / "runs" / "run"
    shutil.copytree(reference.folder[kind], run)
    path, how = damage(run, draw)

    def is_error(code: int, err: str) -> bool:
        assert code in (0, 1, 2) and "Traceback" not in err
        assert code == 0 or (err.count("\n") == 1 and ": " in err), err
        return code != 0

    said = []
    for name in COMMANDS if seed >= FAST else draw.sample(COMMANDS, 1):
        code, out, err = command(name, run, tmp_path)
        said.append((name, err or "same"))
        if not is_error(code, err) and name != "fit":
            in_checkpoint = path.parts[0] == "checkpoints"
            steps = STEPS[: 3 if kind == "finished" else 2]
            assert out in [reference.said[name][step] for step in (steps if in_checkpoint else steps[-1:])]

    code, out, err = call_train(*reference.argv, f"--out={run.parent}")
    said.append(("resume", err or "same"))
    if not is_error(code, err):
        bits, row = reference.result
        assert f"{row['loss']:.4f}" in out
        found = read_json(run / "summary.json")
        assert all(found.get(key) in (None, value) for key, value in row.items()) and found["loss"] == row["loss"]
        if kind == "stopped" or path.parts[-1] == "summary.json":
            assert result(run)[0] == bits
        assert not list(run.rglob("*.tmp"))
    print(f"\nDAMAGE {kind} {path} {how}: {said}")
