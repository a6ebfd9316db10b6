"""One run from options to summary. To change the golden losses in golden/losses.json on purpose:
PYTHONPATH=. python tests/test_train.py    (one thread, float32)"""

import dataclasses
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import threads
from safetensors.torch import load_file

import kernels
import train
from nanochin.base.cli import UserError
from nanochin.base.console import Progress
from nanochin.base.files import read_json, sha256_of
from nanochin.config import Config, make_shape
from nanochin.data.corpus import Corpus
from nanochin.data.text import Tokens
from nanochin.data.tokenizer import Tokenizer
from nanochin.model import GPT
from nanochin.plan.flops import count_flops
from nanochin.run import checkpoint
from nanochin.run.device import peak_of
from nanochin.run.evaluate import beginning, evaluate
from nanochin.run.folder import open_run, read_log
from nanochin.run.optim import Adam, learning_rate
from nanochin.run.record import describe, unlike
from nanochin.run.sample import generate
from nanochin.run.step import Shards

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = Path(__file__).parent / "golden" / "losses.json"


def run(config: Config) -> tuple[dict, Path, list[dict]]:
    """Train quietly -> (summary, folder, rows of the log)."""
    summary = train.train(config, quiet=True)
    folder = Path(config.out) / summary["name"]
    return summary, folder, read_log(folder)


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def weights(folder: Path) -> dict[str, list]:
    """The weights of the newest checkpoint, as numbers that can be compared."""
    tensors = load_file(checkpoint.newest(folder) / "model.safetensors")
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def untimed(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("tokens_per_s", "mfu", "seconds", "run", "name")}


# ---------------------------------------------------------------------------------------------------------------------
# The losses


GOLDEN_OPTIONS = {"tokens": 20 * 256.0, "batch_tokens": 256, "log_every": 1, "model": "16x2",
                  "warmup_tokens": 1024.0, "beta2": 0.99}  # fmt: skip
GOLDEN_VARIANTS = {
    "chinchilla": {},
    "gpt2": {"norm": "layernorm", "positions": "learned", "bias": True, "activation": "gelu_tanh"}
    | {"schedule": "linear", "optimizer": "adam"},
    "llama": {"activation": "swiglu", "tied": False, "schedule": "wsd", "tokenizer": "bpe", "vocab_size": 300},
    "others": {"activation": "relu2", "qk_norm": True, "z_loss": 1e-3, "clip": 0.1, "seed": 7},
}


@pytest.mark.parametrize("variant", GOLDEN_VARIANTS)
def test_golden_losses(tiny, variant):
    """The first 20 losses of a run equal those in the committed file to 1e-4."""
    _, _, rows = run(tiny(**GOLDEN_OPTIONS | GOLDEN_VARIANTS[variant]))
    assert losses(rows) == pytest.approx(json.loads(GOLDEN.read_text())[variant], rel=1e-4)


def test_same_seed_same_bits(tiny):
    """Two runs with one seed have bit-identical weights, logs and summaries; another seed gives other losses."""
    first, folder, rows = run(tiny(out=tiny().out + "1"))
    again, other_folder, other_rows = run(tiny(out=tiny().out + "2"))
    assert weights(folder) == weights(other_folder)
    assert list(map(untimed, rows)) == list(map(untimed, other_rows)) and untimed(first) == untimed(again)
    _, _, seed_rows = run(tiny(seed=1))
    assert all(a != b for a, b in zip(losses(rows), losses(seed_rows), strict=True))


def test_checkpoints_are_the_same_bytes(tiny, monkeypatch):
    """The last checkpoints of equal runs, one of them stopped and resumed, are the same files but for the clock, also
    the state of the random numbers, whether or not the peak of the CPU was measured."""
    first, again, resumed = (tiny(out=tiny().out + name, log_every=7, save_steps=(45,)) for name in "123")
    run(first)
    monkeypatch.setattr("train.peak_of", peak_of.__wrapped__)
    run(again)
    steps = iter([train.train_step] * 60)
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(train, "train_step", lambda *args: next(steps)(*args))
        run(resumed)

    def digests(config: Config) -> dict[str, str]:
        files = (run(config)[1] / "checkpoints" / "step-100").iterdir()
        return {path.name: sha256_of(path) for path in files if path.name != "clock.json"}

    assert digests(first) == digests(again) == digests(resumed) and len(digests(first)) == 3


def test_outside_the_main_thread(tiny):
    """Where signal handlers cannot be set, a run is trained all the same."""
    with ThreadPoolExecutor(1) as pool:
        assert math.isfinite(pool.submit(train.train, tiny(), quiet=True).result()["loss"])


def test_model_learns(tiny):
    """In 100 steps a tiny model gets below the entropy of byte frequencies, also on validation text."""
    summary, _, rows = run(tiny(tokens=25_600.0, batch_tokens=256))
    text = Path(tiny().data[0]).read_bytes()
    shares = [text.count(byte) / len(text) for byte in set(text)]
    entropy = -sum(p * math.log(p) for p in shares)
    assert losses(rows)[0] > 4.5 > entropy > losses(rows)[-1]
    assert summary["loss"] < entropy


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e9])
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 3, 4, 6])
def test_gradient_is_that_of_the_batch(micro_batch, shards, clip, four_threads, monkeypatch):
    """The optimizer gets the gradient of the mean over the batch, for any micro-batch and shards, scaled to `clip` if
    it is above; the reported norm is the one before clipping."""
    model = GPT(make_shape(16, 2, vocab_size=31, seq_len=8))
    batch = torch.randint(31, (6, 9), generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(model(batch[:, :-1], batch[:, 1:]), list(model.parameters()))
    norm = torch.stack([g.double().norm() for g in expected]).norm().item()
    scale = 0.01 / norm if clip == 0.01 else 1.0
    optimizer, seen = Adam(model, "adamw", 0.0, (0.9, 0.99), 0.0, False), []
    monkeypatch.setattr(optimizer, "step", lambda: seen.extend(p.grad.clone() for p in model.parameters()))
    loss, reported = train.train_step(Shards(model, shards), optimizer, batch, micro_batch, clip)
    for a, b in zip(seen, expected, strict=True):
        assert (a - scale * b).norm() < 1e-4 * scale * b.norm()
    assert reported.item() == pytest.approx(norm, rel=1e-5) and norm > 0.1
    assert loss.item() == pytest.approx(model(batch[:, :-1], batch[:, 1:]).item(), rel=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_threads_share_a_batch(tiny, four_threads):
    """Runs on two threads are bit-identical to each other, and equal to one thread's losses up to rounding."""
    usual = {"batch_tokens": 2048, "tokens": 20_480.0, "log_every": 1}
    runs = [run(tiny(out=f"{tiny().out}{i}", threads=threads, **usual)) for i, threads in enumerate((2, 2, 1))]
    first, again, one_thread = (weights(folder) for _, folder, _ in runs)
    assert first == again != one_thread
    assert losses(runs[0][2]) == losses(runs[1][2]) == pytest.approx(losses(runs[2][2]), rel=1e-5)


def test_kernels_fallback(tiny):
    """With `kernels` fallback, PyTorch operations are used on any device, and the record says so."""
    with kernels.use("auto", attention=lambda *_: 1 / 0):
        with pytest.raises(ZeroDivisionError):
            run(tiny())
        _, folder, _ = run(tiny(name="plain", kernels="fallback"))
    assert read_json(folder / "config.json")["kernels"] == ["fallback", "as requested"]


def test_out_of_memory_halves_the_micro_batch(tiny, monkeypatch):
    """The losses are the same up to rounding, and a resumed run begins with the smaller micro-batch."""
    _, _, expected = run(tiny(name="expected", log_every=1))
    original = train.train_step

    def short_of_memory(shards, optimizer, batch, micro_batch, *rest):
        if micro_batch > 1:
            raise torch.OutOfMemoryError
        return original(shards, optimizer, batch, micro_batch, *rest)

    monkeypatch.setattr(train, "train_step", short_of_memory)
    _, folder, rows = run(tiny(name="short", log_every=1))
    assert losses(rows) == pytest.approx(losses(expected), rel=1e-5)
    assert read_json(folder / "checkpoints" / "step-100" / "state.json")["micro_batch"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Schedules, branches and records


def test_schedule_is_logged_and_used(tiny, monkeypatch):
    """The learning rates in the log and in the optimizer's steps are those of the schedule."""
    used, step = [], Adam.step
    monkeypatch.setattr(Adam, "step", lambda self: used.append(self.lr) or step(self))
    config = tiny(schedule="wsd", final_lr=0.0, warmup_tokens=1280.0, log_every=1)
    _, _, rows = run(config)
    assert used == [row["lr"] for row in rows if "lr" in row]
    assert used == pytest.approx([0.01 * learning_rate(config, step) for step in range(100)], rel=1e-9)


def test_branch_equals_the_run_from_scratch(tiny):
    """A cooldown branched from a constant-rate trunk is bit-identical to the same wsd run from scratch."""
    usual = {"warmup_tokens": 1280.0, "log_every": 7, "eval_every": 20}
    run(tiny(name="trunk", schedule="constant", tokens=128 * 90.0, save_steps=(40, 70), keep=1, **usual))
    scratch, folder, rows = run(tiny(schedule="wsd", **usual))
    branch, branch_folder, branch_rows = run(tiny(schedule="wsd", branch_from="trunk@70", **usual))
    assert branch_folder != folder and branch["trunk"] == "trunk" and scratch["trunk"] is None
    assert weights(folder) == weights(branch_folder) and branch["loss"] == scratch["loss"]
    assert [row["step"] for row in branch_rows] == [77, 80, 84, 91, 98, 100, 100]
    later = [untimed(row) for row in rows if row["step"] > 70]
    assert [untimed(row) for row in branch_rows] == later


@pytest.mark.parametrize(
    "options, said",
    [
        ({"lr": 0.02}, "that run has lr = 0.01, this one 0.02"),
        ({"branch_from": "trunk@33"}, "steps 10, 80, 90"),
        ({"tokens": 90 * 128.0, "branch_from": "trunk@90"}, "it has seen 11520 tokens already"),
        ({"branch_from": "trunk@90"}, "from step 81 on, its learning rate differs"),
        ({"branch_from": "trunk@10", "schedule": "cosine"}, "from step 1 on, its learning rate differs"),
    ],
)
def test_impossible_branches(tiny, options, said):
    """A branch needs a checkpoint of a run with the same options and the same learning rates up to it."""
    usual = {"warmup_tokens": 0.0, "schedule": "constant"}
    run(tiny(name="trunk", tokens=128 * 90.0, save_steps=(10, 80), keep=1, **usual))
    with pytest.raises(UserError, match=said) as error:
        run(tiny(**usual | {"schedule": "wsd", "branch_from": "trunk@10"} | options))
    assert error.value.code == 2


def test_budget_is_spent(tiny):
    """With `budget` and `model`, the tokens cost the budget to within half a step, and the FLOPs in the record are
    those of that shape and those tokens."""
    summary, folder, rows = run(tiny(budget=1e9, tokens=None))
    shape = make_shape(16, 1, vocab_size=256, seq_len=32)
    flops = count_flops(shape, summary["tokens"])
    step = flops["physical"] / summary["tokens"] * 128
    assert abs(flops["physical"] - 1e9) <= step / 2
    assert summary["tokens"] % 128 == 0 and summary["flops"] == rows[-2]["flops"] == flops["physical"]
    assert all(summary[f"flops_{key}"] == flops[key] for key in flops if key != "physical")
    assert summary["budget"] == 1e9 and rows[-2]["tokens"] == summary["tokens"]
    assert read_json(folder / "config.json")["options"]["tokens"] == summary["tokens"]


def test_help_states_rules_and_defaults(tiny):
    """`--help` has the rules that the plan gives as reasons, and the defaults by device."""
    config = dataclasses.replace(tiny(), budget=1e13, model=None, tokens=None, lr=None, batch_tokens=None, seq_len=256)
    plan, said = train.resolve(config, Progress(quiet=True)).plan, {f.name: f.metadata["help"] for f in fields(Config)}
    for name in ("batch_tokens", "warmup_tokens", "beta2"):
        assert said[name].endswith(f"by rule: {plan.why[name]}")
    rate = (
        plan.why["lr"]
        .replace(f"({plan.batch_tokens})", "(B)")
        .replace(f"{plan.shape.width}, by batch and width;", "C,")
    )
    assert said["lr"].endswith(f"by rule: {rate}")
    cpu, cuda = train.DEFAULTS["cpu"], train.DEFAULTS["cuda"]
    budgets = (f"{device['budget']:g}".replace("+", "") for device in (cpu, cuda))
    assert said["budget"].endswith("{} on a CPU, {} on CUDA".format(*budgets))
    assert said["seq_len"].endswith(f"{cpu['seq_len']} on a CPU, {cuda['seq_len']} on CUDA")


def test_log_and_summary(tiny):
    """Steps and tokens of the rows; evaluations; losses are means over the steps since the last row; `save_steps` are
    kept in addition to `keep`."""
    _, _, every = run(tiny(out=tiny().out + "1", log_every=1))
    summary, folder, rows = run(tiny(log_every=8, eval_every=25, save_steps=(30, 60, 90), keep=1))
    logged, evaluated = ([row for row in rows if key in row] for key in ("loss", "val_loss"))
    assert [row["step"] for row in logged] == [*range(8, 97, 8), 100]
    assert [row["step"] for row in evaluated] == [0, 25, 50, 75, 100]
    assert [row["tokens"] for row in logged] == [128 * row["step"] for row in logged]
    single, start = losses(every), 0
    for row in logged:
        assert row["loss"] == pytest.approx(sum(single[start : row["step"]]) / (row["step"] - start), rel=1e-6)
        start = row["step"]
    assert {"flops", "lr", "grad_norm", "tokens_per_s", "mfu"} <= logged[0].keys()
    assert summary["loss"] == evaluated[-1]["val_loss"] and summary["val_bpb"] == evaluated[-1]["val_bpb"]
    assert summary == read_json(folder / "summary.json")
    assert checkpoint.steps(folder) == [30, 60, 90, 100] and not list(folder.glob("*.tmp"))


def test_finished_run_is_not_trained_again(tiny, monkeypatch, capsys):
    """The same command on a finished run prints the loss and changes no file."""
    summary, folder, _ = run(tiny())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    monkeypatch.setattr(train, "train_step", None)
    assert train.train(tiny()) == summary
    assert f"{folder} is finished: loss {summary['loss']:.4f}" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


def test_output(tiny, tmp_path, capsys):
    """A run prints its plan, its result, a sample, its folder, and a warning for more than one epoch of text; with
    `quiet`, nothing."""
    (tmp_path / "short.txt").write_text(Path(tiny().data[0]).read_text()[:10_000])
    config = tiny(sample_tokens=20, data=(str(tmp_path / "short.txt"),), val_bytes=1024)
    summary = train.train(config)
    out = capsys.readouterr().out
    assert summary["epochs"] == pytest.approx(12_800 / summary["unique_tokens"]) and 1.2 < summary["epochs"] < 1.6
    result = f"{summary['loss']:.4f} nats per token, {summary['val_bpb']:.4f} bits per byte"
    epochs = f"warning: {summary['epochs']:.1f} epochs of the text"
    assert all(words in out for words in ("16x1", "float32", result, "a sample", summary["name"], epochs))
    assert train.train(tiny(), quiet=True)["epochs"] < 0.1
    assert capsys.readouterr().out == ""


def test_law_predicts_only_runs_on_its_text(tiny, tmp_path):
    """The predicted loss and interval of a laws.json are in config.json and the summary, as computed by hand; a law of
    another text, tokenizer or context predicts nothing."""
    first = train.train(tiny(name="first"), quiet=True)
    constants = {"E": 1.0, "A": 20.0, "B": 30.0, "alpha": 0.4, "beta": 0.4}
    scatter = {"replicates": {name: [value] * 9 for name, value in constants.items()}, "noise": 0.02}
    meta = {"params_convention": "total", **{key: first[key] for key in ("tokenizer", "data_sha", "val_sha")}}
    law = tmp_path / "laws.json"

    def train_by(name: str, **changed) -> tuple[dict, dict]:
        law.write_text(json.dumps({"approach3": constants | scatter, "meta": meta | changed}))
        summary, folder, _ = run(tiny(law=str(law), name=name))
        return summary, read_json(folder / "config.json")["predicted"]

    loss = 1 + 20 * first["params"] ** -0.4 + 30 * first["tokens"] ** -0.4
    want = pytest.approx([loss, loss * math.exp(-0.0392), loss * math.exp(0.0392)], rel=1e-3)
    keys = ("predicted_loss", "predicted_low", "predicted_high")
    same = ({"seq_len": str(tiny().seq_len)}, {"seq_len": None})
    for changed in (*same, {"tokenizer": "bpe"}, {"data_sha": "0"}, {"val_sha": "0"}, {"seq_len": "7"}):
        summary, recorded = train_by("-".join(map(str, *changed.items())), **changed)
        for found in (summary, recorded):
            assert [found[key] for key in keys] == (want if changed in same else [None] * 3)
        why = unlike(train.resolve(tiny(law=str(law)), Progress(quiet=True)))
        assert f" {next(iter(changed.values()))}, this one" in why if changed not in same else why == ""


def test_prediction_is_pre_registered(tiny):
    """The summary has the prediction made at the start, even if the call that finishes the run names no law."""
    config = tiny(name="begun")
    record = describe(train.resolve(config, Progress(quiet=True)))
    predicted = {"predicted_loss": 1.5, "predicted_low": 1.4, "predicted_high": 1.6}
    with open_run(config.out, "begun", record | {"predicted": predicted}):
        pass
    summary = train.train(config, quiet=True)
    assert {key: summary[key] for key in predicted} == predicted


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and sampling


def nats_by_hand(model: GPT, ids: list[int]) -> float:
    """Sum over all but the first token of -log p, in windows of seq_len, one token at a time."""
    T, total = model.shape.seq_len, 0.0
    for position in range(1, len(ids)):
        start = (position - 1) // T * T
        logits = model(torch.tensor([ids[start:position]]))[0, -1].double()
        total -= logits.log_softmax(-1)[ids[position]].item()
    return total


@pytest.mark.parametrize("count", [2, 9, 10, 29])
def test_evaluate_by_hand(count, monkeypatch):
    """Loss and bits per byte are those of the logits, for any length of the last window and any batch."""
    model = GPT(make_shape(16, 1, vocab_size=31, seq_len=8), seed=3)
    ids = torch.randint(31, (count,), generator=torch.Generator().manual_seed(count))
    with torch.no_grad():
        nats = nats_by_hand(model, ids.tolist())
    for at_once in (16384, 16, 1):
        monkeypatch.setattr("nanochin.run.evaluate.TOKENS_AT_ONCE", at_once)
        loss, bpb = evaluate(model, ids.numpy(), text_bytes=50)
        assert loss == pytest.approx(nats / (count - 1), rel=1e-6)
        assert bpb == pytest.approx(nats / math.log(2) / 50, rel=1e-6)
    assert evaluate(model, ids.numpy(), text_bytes=0)[1] is None


def test_evaluate_on_threads(four_threads, monkeypatch):
    """Four threads give the bits of one, also with a last piece that is shorter; an error in a thread is raised."""
    model = GPT(make_shape(16, 1, vocab_size=31, seq_len=8), seed=3)
    ids = torch.randint(31, (16 * 9 + 5,), generator=torch.Generator().manual_seed(1)).numpy()
    monkeypatch.setattr("nanochin.run.evaluate.TOKENS_AT_ONCE", 16)
    seen, usual = set(), GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *args: seen.add(threading.current_thread()) or usual(*args))
    found = evaluate(model, ids, text_bytes=50)
    assert len(seen) > 1 and threading.current_thread() not in seen and torch.get_num_threads() == 4
    with threads(1):
        assert evaluate(model, ids, text_bytes=50) == found
    monkeypatch.setattr(GPT, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, ids, text_bytes=50)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_evaluations_during_training(tiny, tokenizer, four_threads, monkeypatch):
    """They begin at step 0, near log V, on the beginning of the validation text with `eval_bytes`; the last one is on
    all of it. They change neither the weights nor the final loss."""
    monkeypatch.setattr("nanochin.run.evaluate.TOKENS_AT_ONCE", 512)
    usual = {"threads": 2, "tokenizer": tokenizer, "vocab_size": 300, "batch_tokens": 2048, "tokens": 20_480.0}
    summary, folder, _ = run(tiny(out=tiny().out + "1", **usual))
    again, other, rows = run(tiny(eval_every=4, eval_bytes=1500, **usual))
    assert weights(folder) == weights(other) and untimed(summary) == untimed(again)
    *early, last = (row for row in rows if "val_loss" in row)
    assert [row["step"] for row in early] == [0, 4, 8] and "val_tokens" not in last
    corpus = train.resolve(tiny(**usual), Progress(quiet=True)).corpus
    part = corpus.val[: early[0]["val_tokens"]]
    size = len(corpus.tokenizer.decode_bytes(part))
    assert abs(size - 1500) < 100 and {row["val_tokens"] for row in early} == {len(part)}
    vocab = summary["vocab_size"]
    loss, bpb = evaluate(GPT(make_shape(16, 1, vocab_size=vocab, seq_len=32)), part, size)
    assert (early[0]["val_loss"], early[0]["val_bpb"]) == pytest.approx((loss, bpb), rel=1e-6)
    assert abs(loss - math.log(vocab)) < 0.5


def test_beginning_of_token_files():
    """Without a text its bytes are those of the file; all of it has no part."""
    val, numbers = Tokens([np.arange(500, dtype=np.uint16)]), Tokenizer.load("ids-500")
    corpus = Corpus(val, val, numbers, "x", Path("x"), "", "", val_bytes=0)
    part, size = beginning(corpus, 200)
    assert part[:].tolist() == list(range(100)) and size == 0
    for all_of_it in (None, 1000, 10**9):
        assert beginning(corpus, all_of_it) == (val, 0)
    assert len(beginning(corpus, 1)[0]) == 2


def test_bits_per_byte_of_our_own_bpe(tiny):
    """Bits per byte are nats by hand over the bytes of the validation text. The folder has the corpus's tokenizer."""
    config = tiny(tokenizer="bpe", vocab_size=300, val_bytes=1024)
    summary, folder, _ = run(config)
    corpus = train.resolve(config, Progress(quiet=True)).corpus
    model, tokenizer, record = checkpoint.load_run(folder)
    ids = corpus.val[:].tolist()
    text = tokenizer.decode_bytes(ids)
    assert text == corpus.tokenizer.decode_bytes(ids) and text in Path(config.data[0]).read_bytes()
    assert len(text) == record["corpus"]["val_bytes"] >= 1000
    with torch.no_grad():
        nats = nats_by_hand(model, ids)
    assert len(ids) < 0.8 * len(text)
    assert summary["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert summary["val_bpb"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)


def test_commands_on_a_run(tiny, command, tmp_path):
    """`python -m nanochin sample` and `evaluate` print what the functions return."""
    summary, folder, _ = run(tiny(tokenizer="bpe", vocab_size=300))
    model, tokenizer, _ = checkpoint.load_run(folder)
    ids = [tokenizer.eot, *tokenizer.encode(b"The ").tolist()]  # a prompt is the beginning of a document
    ids = generate(model, torch.tensor(ids), 20, temperature=0).tolist()
    done = command("-m", "nanochin", "sample", folder, "--prompt=The ", "--tokens=20", "--temperature=0")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", tokenizer.decode(ids) + "\n")
    assert tokenizer.eot not in ids[1:]

    text = tmp_path / "some.txt"
    text.write_text("made-up words of another day")
    ids = [tokenizer.eot, *tokenizer.encode(text.read_bytes()).tolist(), tokenizer.eot]
    loss, bpb = evaluate(model, np.array(ids), len(text.read_bytes()))
    done = command("-m", "nanochin", "evaluate", summary["name"], f"--out={folder.parent}", "--data", text)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"loss {loss:.4f} nats per token, {bpb:.4f} bits per byte" in done.stdout


if __name__ == "__main__":  # write the golden losses
    import tempfile

    from conftest import pseudo_english, tiny_config

    with tempfile.TemporaryDirectory() as name:
        text = Path(name) / "made-up.txt"
        text.write_text(pseudo_english(200_000))
        found = {
            variant: losses(run(tiny_config(text, Path(name), Path(name), **GOLDEN_OPTIONS | options))[2])
            for variant, options in GOLDEN_VARIANTS.items()
        }
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
