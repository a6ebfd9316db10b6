"""One run from options to summary. The golden losses are in golden/losses.json; where a change of them is meant:
PYTHONPATH=. python tests/test_train.py  writes them anew (in one thread, float32)."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kernels
import train
from nanochin.base.cli import RunError, UserError
from nanochin.base.console import Progress
from nanochin.base.files import read_json
from nanochin.config import Config, make_shape
from nanochin.data.tokenizer import Tokenizer
from nanochin.model import GPT
from nanochin.plan.flops import count_flops
from nanochin.run import checkpoint
from nanochin.run.evaluate import evaluate
from nanochin.run.folder import open_run, read_log
from nanochin.run.optim import Adam
from nanochin.run.record import describe
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


def weights(folder: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    last = checkpoint.newest(folder) if step is None else folder / "checkpoints" / f"step-{step}"
    return load_file(last / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def untimed(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("tokens_per_s", "mfu", "seconds", "run", "name")}


# ---------------------------------------------------------------------------------------------------------------------
# The losses


GOLDEN_OPTIONS = {"tokens": 20 * 256.0, "batch_tokens": 256, "log_every": 1, "model": "16x2",
                  "warmup_tokens": 1024.0, "beta2": 0.99}  # fmt: skip
GOLDEN_VARIANTS = {
    "chinchilla": {},
    "gpt2": {
        "norm": "layernorm",
        "positions": "learned",
        "bias": True,
        "activation": "gelu_tanh",
        "schedule": "linear",
        "optimizer": "adam",
    },
    "llama": {"activation": "swiglu", "tied": False, "schedule": "wsd", "tokenizer": "bpe", "vocab_size": 300},
    "others": {"activation": "relu2", "qk_norm": True, "z_loss": 1e-3, "clip": 0.1, "seed": 7},
}


@pytest.mark.parametrize("variant", GOLDEN_VARIANTS)
def test_golden_losses(tiny, variant):
    """The first 20 losses of a run are those in the committed file, to 1e-4."""
    _, _, rows = run(tiny(**GOLDEN_OPTIONS | GOLDEN_VARIANTS[variant]))
    assert losses(rows) == pytest.approx(json.loads(GOLDEN.read_text())[variant], rel=1e-4)


def test_same_seed_same_bits(tiny):
    """Two runs of one seed end in the same bits and log the same; another seed makes another run of other losses."""
    first, folder, rows = run(tiny(out=tiny().out + "1"))
    again, other_folder, other_rows = run(tiny(out=tiny().out + "2"))
    assert same(weights(folder), weights(other_folder))
    assert list(map(untimed, rows)) == list(map(untimed, other_rows)) and untimed(first) == untimed(again)
    _, _, seed_rows = run(tiny(seed=1))
    assert all(a != b for a, b in zip(losses(rows), losses(seed_rows), strict=True))


def test_model_learns(tiny):
    """In 100 steps a tiny model gets better than knowing how often each byte occurs, and so on validation text."""
    summary, _, rows = run(tiny(tokens=25_600.0, batch_tokens=256))
    text = Path(tiny().data[0]).read_bytes()
    shares = [text.count(byte) / len(text) for byte in set(text)]
    entropy = -sum(p * math.log(p) for p in shares)
    assert losses(rows)[0] > 4.5 > entropy > losses(rows)[-1]
    assert summary["loss"] < entropy


# ---------------------------------------------------------------------------------------------------------------------
# Batches and gradients


def test_micro_batch_changes_nothing(tiny, monkeypatch):
    """However the batch is cut, the windows come in the same order and the losses agree to rounding."""
    seen, logs = [], []
    original = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: seen.append(args[2].clone()) or original(*args))
    for micro_batch in (4, 3, 1):  # 3 does not divide the 4 sequences of a batch
        seen.clear()
        _, _, rows = run(tiny(out=f"{tiny().out}{micro_batch}", micro_batch=micro_batch, log_every=1))
        logs.append((losses(rows), [row["grad_norm"] for row in rows if "loss" in row], torch.stack(seen)))
    for other in logs[1:]:
        assert other[0] == pytest.approx(logs[0][0], rel=1e-5)
        assert other[1] == pytest.approx(logs[0][1], rel=1e-3)
        assert torch.equal(other[2], logs[0][2])


@pytest.mark.parametrize("members", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 3, 4, 6])
def test_accumulated_gradient_is_that_of_the_batch(micro_batch, members, four_threads, monkeypatch):
    """The gradient that reaches the optimizer is the one of the mean over the whole batch, whoever shares it out."""
    model = GPT(make_shape(16, 2, vocab_size=31, seq_len=8))
    shards = Shards(model, members)
    batch = torch.randint(31, (6, 9), generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(model(batch[:, :-1], batch[:, 1:]), list(model.parameters()))
    norm = torch.stack([g.double().norm() for g in expected]).norm().item()
    optimizer, seen = Adam(model, "adamw", 0.0, (0.9, 0.99), 0.0), []
    monkeypatch.setattr(optimizer, "step", lambda: seen.extend(p.grad.clone() for p in model.parameters()))
    loss, reported = train.train_step(shards, optimizer, batch, micro_batch, 0.0)
    for a, b in zip(seen, expected, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()
    assert reported.item() == pytest.approx(norm, rel=1e-5)
    assert loss.item() == pytest.approx(model(batch[:, :-1], batch[:, 1:]).item(), rel=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_threads_share_a_batch(tiny, four_threads):
    """Two threads that share each batch end in the same bits every time, and in one thread's losses to rounding."""
    usual = {"batch_tokens": 2048, "tokens": 20_480.0, "log_every": 1}
    runs = [run(tiny(out=f"{tiny().out}{i}", threads=threads, **usual)) for i, threads in enumerate((2, 2, 1))]
    assert same(weights(runs[0][1]), weights(runs[1][1])) and not same(weights(runs[0][1]), weights(runs[2][1]))
    assert losses(runs[0][2]) == losses(runs[1][2]) == pytest.approx(losses(runs[2][2]), rel=1e-5)


def test_kernels_can_be_left_out(tiny):
    """--kernels fallback computes by PyTorch operations whatever suits the device, and the record says so."""

    def broken(*_):
        raise ZeroDivisionError

    with kernels.use("auto", attention=broken):
        with pytest.raises(ZeroDivisionError):
            run(tiny())
        _, folder, _ = run(tiny(name="plain", kernels="fallback"))
    assert json.loads((folder / "config.json").read_text())["kernels"] == ["fallback", "as asked"]


def test_clipping(monkeypatch):
    """A gradient above the clip is scaled to it; the norm that is reported is the one before."""
    model = GPT(make_shape(16, 1, vocab_size=31, seq_len=8))
    batch = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
    optimizer, seen = Adam(model, "adamw", 0.0, (0.9, 0.99), 0.0), []
    monkeypatch.setattr(optimizer, "step", lambda: seen.append([p.grad.clone() for p in model.parameters()]))
    norms = [train.train_step(Shards(model), optimizer, batch, 2, clip)[1].item() for clip in (0.0, 0.01, 1e9)]
    after = [torch.stack([g.norm() for g in gradient]).norm().item() for gradient in seen]
    assert norms[0] == norms[1] == norms[2] > 0.1
    assert after == pytest.approx([norms[0], 0.01, norms[0]], rel=1e-4)


def test_out_of_memory_halves_the_micro_batch(tiny, monkeypatch):
    """Twice out of memory: the run goes on with a quarter of the micro-batch and the same token batch and losses."""
    usual = {"batch_tokens": 512, "tokens": 10_240.0, "log_every": 1, "eval_every": 5}
    _, _, expected = run(tiny(out=tiny().out + "0", **usual))
    original, sizes = train.train_step, []

    def short_of_memory(shards, optimizer, batch, micro_batch, *more):
        sizes.append(micro_batch)
        if len(sizes) in (6, 7):
            shards.models[0](batch[:1, :-1], batch[:1, 1:]).backward()  # it had begun
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(shards, optimizer, batch, micro_batch, *more)

    monkeypatch.setattr(train, "train_step", short_of_memory)
    _, folder, rows = run(tiny(**usual))
    assert sizes == 6 * [16] + [8] + 15 * [4]
    assert losses(rows) == pytest.approx(losses(expected), rel=1e-5)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    state = json.loads((folder / "checkpoints" / "step-20" / "state.json").read_text())
    assert state["micro_batch"] == 4


def test_one_sequence_that_does_not_fit(tiny, monkeypatch):
    """Where not even one sequence fits, the run ends with one line that says so."""

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "train_step", no_memory)
    with pytest.raises(RunError, match="one sequence of 32 tokens through 16x1 does not fit cpu"):
        run(tiny())


# ---------------------------------------------------------------------------------------------------------------------
# Schedules and branches


def rate_by_hand(schedule, step, steps=100, warmup=10):
    """The n-th step's fraction of the peak, from the definitions of the schedules (Hoffmann et al. 2022, Appendix B;
    Hägele et al. 2024): the decay is a function of the share of it that lies behind."""
    done = step - 1
    rise = step / (warmup + 1)
    share = (done - warmup) / (steps - warmup)
    if schedule == "cosine":
        fall = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(share, 0)))
    elif schedule == "linear":
        fall = 1 - share
    elif schedule == "wsd":
        fall = 1 - math.sqrt(max(0, (done - 80) / 20))
    else:
        fall = 1
    return min(rise, fall)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_schedule_reaches_the_log(tiny, schedule, monkeypatch):
    """The rates in the log, and those the optimizer steps with, are the schedule's, computed by hand."""
    used, original = [], train.train_step

    def spy(shards, optimizer, *rest):
        used.append({optimizer.lr})
        return original(shards, optimizer, *rest)

    monkeypatch.setattr(train, "train_step", spy)
    _, _, rows = run(tiny(schedule=schedule, warmup_tokens=1280.0, log_every=1))
    expected = [0.01 * rate_by_hand(schedule, step) for step in range(1, 101)]
    assert [row["lr"] for row in rows if "lr" in row] == pytest.approx(expected, rel=1e-9)
    assert [used_lr.pop() for used_lr in used] == pytest.approx(expected, rel=1e-9)
    assert not any(used)


def test_branch_is_the_run_from_scratch(tiny):
    """A cooldown branched off a constant-rate trunk ends in the same bits as that wsd run from its start."""
    usual = {"warmup_tokens": 1280.0, "log_every": 7, "eval_every": 20}
    run(tiny(name="trunk", schedule="constant", tokens=128 * 90.0, save_steps=(40, 70), keep=1, **usual))
    scratch, folder, rows = run(tiny(schedule="wsd", **usual))
    branch, branch_folder, branch_rows = run(tiny(schedule="wsd", branch_from="trunk@70", **usual))
    assert branch_folder != folder and branch["trunk"] == "trunk" and scratch["trunk"] is None
    assert same(weights(folder), weights(branch_folder)) and branch["loss"] == scratch["loss"]
    assert [row["step"] for row in branch_rows] == [77, 80, 84, 91, 98, 100, 100]
    later = [untimed(row) for row in rows if row["step"] > 70]
    assert [untimed(row) for row in branch_rows] == later


@pytest.mark.parametrize(
    "options, said",
    [
        ({"lr": 0.02}, "that run has lr = 0.01, this one 0.02"),
        ({"seed": 1}, "that run has seed = 0, this one 1"),
        ({"model": "24x1"}, "that run has "),
        ({"branch_from": "trunk@33"}, r"no such checkpoint; there are steps 10, 80, 90 \(`save_steps`\)"),
        ({"branch_from": "trunk@010"}, "no such checkpoint"),
        ({"branch_from": "trunk"}, "expected RUN@STEP"),
        ({"branch_from": "nobody@10"}, "nobody: no run folder"),
        ({"tokens": 90 * 128.0, "branch_from": "trunk@90"}, "it has seen 11520 tokens already"),
        ({"branch_from": "trunk@90"}, "from step 81 on its learning rate is not that of this run"),
        ({"branch_from": "trunk@10", "schedule": "cosine"}, "from step 1 on its learning rate is not that of this run"),
    ],
)
def test_branches_that_are_no_run_from_scratch(tiny, options, said):
    """A branch must be a run that could have been trained from its start: same options, same rates up to there."""
    usual = {"warmup_tokens": 0.0, "schedule": "constant"}
    run(tiny(name="trunk", tokens=128 * 90.0, save_steps=(10, 80), keep=1, **usual))
    with pytest.raises(UserError, match=said) as error:
        run(tiny(**usual | {"schedule": "wsd", "branch_from": "trunk@10"} | options))
    assert error.value.code == 2


def test_a_trunk_of_another_version(tiny):
    """A trunk whose options this version does not have is named, with what is unknown."""
    usual = {"warmup_tokens": 0.0, "schedule": "constant"}
    _, folder, _ = run(tiny(name="trunk", tokens=128 * 20.0, save_steps=(10,), **usual))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"options": config["options"] | {"muon": True}}))
    with pytest.raises(UserError, match="trunk/config.json is of another version of nanochin .*muon"):
        run(tiny(**usual | {"schedule": "wsd", "branch_from": "trunk@10"}))


# ---------------------------------------------------------------------------------------------------------------------
# Plan and records


def test_budget_is_spent(tiny):
    """--budget and --model: the tokens cost the budget to within half a step, and all counts in the record are those
    of the ledger for that shape and those tokens."""
    summary, folder, rows = run(tiny(budget=1e9, tokens=None))
    shape = make_shape(16, 1, vocab_size=256, seq_len=32)
    flops = count_flops(shape, summary["tokens"])
    step = flops["physical"] / summary["tokens"] * 128
    assert abs(flops["physical"] - 1e9) <= step / 2
    assert summary["tokens"] % 128 == 0 and summary["flops"] == rows[-2]["flops"] == flops["physical"]
    assert {key.removeprefix("flops_"): summary[key] for key in summary if key.startswith("flops_")} == {
        key: flops[key] for key in flops if key != "physical"}  # fmt: skip
    assert summary["budget"] == 1e9 and rows[-2]["tokens"] == summary["tokens"]
    assert json.loads((folder / "config.json").read_text())["options"]["tokens"] == summary["tokens"]


def test_log_and_summary(tiny):
    """Steps, tokens and FLOPs of the rows; evaluations where asked; means over the steps since the row before."""
    _, _, every = run(tiny(out=tiny().out + "1", log_every=1))
    summary, folder, rows = run(tiny(log_every=8, eval_every=25))
    logged, evaluated = ([row for row in rows if key in row] for key in ("loss", "val_loss"))
    assert [row["step"] for row in logged] == [*range(8, 97, 8), 100]
    assert [row["step"] for row in evaluated] == [25, 50, 75, 100]
    assert [row["tokens"] for row in logged] == [128 * row["step"] for row in logged]
    single, start = losses(every), 0
    for row in logged:
        assert row["loss"] == pytest.approx(sum(single[start : row["step"]]) / (row["step"] - start), rel=1e-6)
        start = row["step"]
    assert {"flops", "lr", "grad_norm", "tokens_per_s", "mfu"} <= logged[0].keys()
    assert summary["loss"] == evaluated[-1]["val_loss"] and summary["val_bpb"] == evaluated[-1]["val_bpb"]
    assert summary == json.loads((folder / "summary.json").read_text())
    assert checkpoint.steps(folder) == [100] and not list(folder.glob("*.tmp"))


def test_finished_run_is_not_trained_again(tiny, monkeypatch, capsys):
    """The same command on a finished run says what came out and touches nothing."""
    summary, folder, _ = run(tiny())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    monkeypatch.setattr(train, "train_step", None)
    assert train.train(tiny()) == summary
    assert f"{folder} is finished: loss {summary['loss']:.4f}" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


def test_extra_checkpoints(tiny):
    """--save-steps keeps its steps beyond --keep; --save-every 0 saves nothing else but the end."""
    _, folder, _ = run(tiny(save_steps=(30, 60, 90), keep=1))
    assert checkpoint.steps(folder) == [30, 60, 90, 100]


def test_more_than_an_epoch_is_said(tiny, tmp_path, capsys):
    """Text that is seen more than once: a warning, and the epochs in the summary."""
    path = tmp_path / "short.txt"
    path.write_text(Path(tiny().data[0]).read_text()[:10_000])
    summary = train.train(tiny(data=(str(path),), val_bytes=1024))
    out = capsys.readouterr().out
    assert summary["epochs"] == pytest.approx(12_800 / summary["unique_tokens"]) and 1.2 < summary["epochs"] < 1.6
    assert f"warning: {summary['epochs']:.1f} epochs of the text; the law assumes less than one" in out
    assert train.train(tiny())["epochs"] < 0.1 and "warning" not in capsys.readouterr().out


def test_what_is_shown(tiny, capsys):
    """A run says what it chose, how it went, what came out, a sample, and where it lies."""
    config = tiny(sample_tokens=20, batch_tokens=None, lr=None)
    summary = train.train(config)
    out = capsys.readouterr().out
    plan = train.resolve(config, Progress(quiet=True)).plan
    for said in ("made-up", "16x1", f"{plan.lr:.3g}", "0.03 D^0.69", f"{plan.flops['physical']:.3e}", "float32",
                 f"validation loss {summary['loss']:.4f} nats per token, {summary['val_bpb']:.4f} bits per byte",
                 "a sample", f"{Path(config.out) / summary['name']}   (python -m nanochin sample"):  # fmt: skip
        assert said in out
    train.train(dataclasses.replace(config, seed=1), quiet=True)
    assert capsys.readouterr().out == ""


def test_law_predicts_the_runs_of_its_own_text_only(tiny, tmp_path, capsys):
    """The loss and interval that a laws.json gives stand in config.json from the start, in what is shown and in the
    summary, the law's by hand; a law of another text, tokenizer or context says nothing."""
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
    for seq_len in (str(tiny().seq_len), None):
        summary, recorded = train_by(f"predicted-{seq_len}", seq_len=seq_len)
        assert [summary[key] for key in keys] == want and [recorded[key] for key in keys] == want
    train.train(tiny(law=str(law), name="shown"))
    assert capsys.readouterr().out.count(f"(95%: {summary['predicted_low']:.4f} to ") == 2
    for other in ({"tokenizer": "bpe"}, {"data_sha": "0"}, {"val_sha": "0"}, {"seq_len": "7"}):
        summary, recorded = train_by(next(iter(other)), **other)
        assert [summary[key] for key in keys] == [recorded[key] for key in keys] == [None] * 3


def test_a_prediction_stands_from_the_start(tiny):
    """The summary repeats what config.json predicted at the start, also where the call that ends the run has no law."""
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
    """Sum over all but the first token of -log p, windows of seq_len side by side, one token at a time."""
    T, total = model.shape.seq_len, 0.0
    for position in range(1, len(ids)):
        start = (position - 1) // T * T
        logits = model(torch.tensor([ids[start:position]]))[0, -1].double()
        total -= logits.log_softmax(-1)[ids[position]].item()
    return total


@pytest.mark.parametrize("count", [2, 8, 9, 10, 29])
def test_evaluate_by_hand(count, monkeypatch):
    """Loss and bits per byte are those of the logits, with any last window, however many windows go at once."""
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


def test_bits_per_byte_of_our_own_bpe(tiny):
    """The summary's bits per byte are nats by hand over the bytes of the validation text, not over its tokens."""
    config = tiny(tokenizer="bpe", vocab_size=300, val_bytes=1024)
    summary, folder, _ = run(config)
    job = train.resolve(config, Progress(quiet=True))
    model, tokenizer, record = checkpoint.load_run(folder)
    ids = job.corpus.val[:].tolist()
    text = tokenizer.decode_bytes(ids)
    assert text in Path(config.data[0]).read_bytes() and len(text) == record["corpus"]["val_bytes"] >= 1000
    with torch.no_grad():
        nats = nats_by_hand(model, ids)
    assert len(ids) < 0.8 * len(text)
    assert summary["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert summary["val_bpb"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)


def test_greedy_sampling_takes_the_likeliest():
    """At temperature 0 each token is the argmax over the logits of the last seq_len tokens; so it is with top_k 1."""
    model = GPT(make_shape(16, 2, vocab_size=31, seq_len=8), seed=2)
    ids = [5]
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids[-8:]]))[0, -1].argmax()))
    assert generate(model, torch.tensor([5]), 12, temperature=0).tolist() == ids
    assert generate(model, torch.tensor([5]), 12, top_k=1).tolist() == ids


def test_sampling_follows_the_distribution():
    """Sampled tokens are distributed as softmax(logits / temperature) over the k likeliest; the seed decides."""
    model = GPT(make_shape(16, 1, vocab_size=7, seq_len=4), seed=2)
    with torch.no_grad():
        logits = 4 * model(torch.tensor([[3]]))[0, -1]
        model.blocks[0].norm2.weight.mul_(4)  # less uniform
    top = logits.topk(3).indices
    expected = torch.zeros(7)
    expected[top] = (logits[top] / 1.5).softmax(0)
    draws = [int(generate(model, torch.tensor([3]), 1, temperature=1.5, top_k=3, seed=s)[1]) for s in range(1000)]
    shares = torch.bincount(torch.tensor(draws), minlength=7) / 1000
    assert (shares - expected).abs().max() < 4 * math.sqrt(0.25 / 1000)
    assert set(draws) == set(top.tolist())
    assert draws[:20] == [int(generate(model, torch.tensor([3]), 1, temperature=1.5, top_k=3, seed=s)[1])
                          for s in range(20)]  # fmt: skip


def test_commands_on_a_run(tiny, command, tmp_path):
    """`python -m nanochin sample` and `evaluate` from the shell give what the functions give."""
    summary, folder, _ = run(tiny(tokenizer="bpe", vocab_size=300))
    done = command("-m", "nanochin", "sample", folder, "--prompt=The ", "--tokens=20", "--temperature=0")
    model, tokenizer, _ = checkpoint.load_run(folder)
    ids = generate(model, torch.tensor([int(i) for i in tokenizer.encode(b"The ")]), 20, temperature=0)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", tokenizer.decode(ids.tolist()) + "\n")

    text = tmp_path / "some.txt"
    text.write_text("made-up words of another day")
    ids = [tokenizer.eot, *tokenizer.encode(text.read_bytes()).tolist(), tokenizer.eot]
    with torch.no_grad():
        nats = nats_by_hand(model, ids)
    bpb = nats / math.log(2) / len(text.read_bytes())
    done = command("-m", "nanochin", "evaluate", summary["name"], f"--out={folder.parent}", "--data", text)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"loss {nats / (len(ids) - 1):.4f} nats per token, {bpb:.4f} bits per byte" in done.stdout


def test_tokenizer_of_a_run_is_its_own(tiny):
    """A run's folder holds what its tokens mean: the ranks of our own BPE are those of the corpus it was trained on."""
    config = tiny(tokenizer="bpe", vocab_size=300)
    _, folder, _ = run(config)
    corpus = train.resolve(config, Progress(quiet=True)).corpus
    text = "Some words, others; 123 of them."
    assert (
        Tokenizer.load("bpe", folder).encode(text.encode()).tolist() == corpus.tokenizer.encode(text.encode()).tolist()
    )


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
