"""Token files of nanoGPT, llm.c and Megatron, written here by their documented layouts."""

import gzip
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import arguments

import train
from nanochin import checkpoint, runs
from nanochin import tokenfiles as module
from nanochin.config import UserError
from nanochin.data import prepare, read_tokens
from nanochin.files import read_json
from nanochin.text import Tokens
from nanochin.tokenfiles import hold_out, open_tokens
from nanochin.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
V = 300


def some_ids(count: int, seed: int = 0) -> np.ndarray:
    """Ids below V of which each is likely to follow from the one before, so that a model can learn them."""
    draw = np.random.default_rng(seed)
    return np.cumsum(draw.integers(1, 4, count)) % V


def nanogpt(path: Path, ids) -> Path:
    """karpathy/nanoGPT data/openwebtext/prepare.py: uint16, nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.asarray(ids).astype("<u2").tobytes())
    return path


def llm_c(
    path: Path, ids, magic: int = 20240520, version: int = 1, kind: str = "<u2", count: int | None = None
) -> Path:
    """karpathy/llm.c dev/data/data_common.py: 256 int32, the first three magic, version, number of tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids).astype(kind).tobytes())
    return path


def llama3(path: Path, ids) -> Path:
    return llm_c(path, ids, magic=20240801, version=7, kind="<u4")


def megatron(path: Path, ids, code: int = 8, modes: bool = False, cuts=(0.1, 0.5, 0.7), **change) -> Path:
    """NVIDIA/Megatron-LM megatron/core/datasets/indexed_dataset.py: the pair .bin, .idx of sequences; `change`
    puts something wrong into a field of the .idx."""
    kind = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.get(code, "<u2")
    edges = [0, *(int(cut * len(ids)) for cut in cuts), len(ids)]
    lengths = np.diff(edges).astype("<i4")
    width = np.dtype(kind).itemsize
    fields = {
        "magic": b"MMIDIDX\0\0", "version": struct.pack("<Q", 1), "code": struct.pack("<B", code),
        "sequences": struct.pack("<Q", len(lengths)), "documents": struct.pack("<Q", len(lengths) + 1),
        "lengths": lengths.tobytes(), "offsets": (np.array(edges[:-1]) * width).astype("<i8").tobytes(),
        "bounds": np.arange(len(lengths) + 1).astype("<i8").tobytes(), "modes": bytes(len(lengths)) if modes else b"",
    }  # fmt: skip
    path.write_bytes(np.asarray(ids).astype(kind).tobytes())
    path.with_suffix(".idx").write_bytes(b"".join((fields | change).values()))
    return path


WRITERS = {"nanoGPT": nanogpt, "llm.c": llm_c, "Llama 3": llama3, "Megatron": megatron}
every_format = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


# ---------------------------------------------------------------------------------------------------------------------
# What is read


@every_format
def test_tokens_are_used_as_they_are(tmp_path, write):
    """The ids of the file are the training tokens, mapped from it rather than copied, those of val.bin beside it the
    validation tokens; bytes are unknown, and nothing is written."""
    ids, val = some_ids(1000), some_ids(90, seed=1)
    path = write(tmp_path / "train.bin", ids)
    write(tmp_path / "val.bin", val)
    corpus = prepare((str(path),), vocab_size=V, cache=tmp_path / "cache")
    assert corpus.train[:].tolist() == ids.tolist() and corpus.val[:].tolist() == val.tolist()
    assert (corpus.tokenizer.name, corpus.tokenizer.vocab_size, corpus.val_bytes) == ("ids-300", V, 0)
    (part,) = corpus.train.parts
    while part.base is not None and not isinstance(part, np.memmap):
        part = part.base
    assert isinstance(part, np.memmap) and str(part.filename) == str(path)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("modes", [False, True])
@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_integer_types_of_megatron(tmp_path, code, modes):
    """Each of Megatron's integer types, with and without the modes that may end the .idx, found by the .bin, by the
    .idx and by the name that both share."""
    ids = some_ids(777) % 100
    path = megatron(tmp_path / "corpus_text_document.bin", ids, code, modes)
    assert open_tokens(str(path)).ids.tolist() == ids.tolist()
    for name in (path, path.with_suffix(".idx"), path.with_suffix("")):
        assert read_tokens((str(name),), Tokenizer.load("ids-100"))[0].tolist() == ids.tolist()


def test_shards_follow_one_another(tmp_path):
    """A folder of shards and a glob over them are one stream in the order of their names; those named val are the
    validation set, also when the glob leaves them out."""
    shards = [some_ids(500 + i, seed=i) for i in range(3)]
    for i, ids in enumerate(shards):
        llm_c(tmp_path / f"fineweb_train_{i:06d}.bin", ids)
    llm_c(tmp_path / "fineweb_val_000000.bin", some_ids(64, seed=9))
    (tmp_path / "readme.md").write_text("not read")
    for name in (tmp_path, tmp_path / "fineweb_train_*.bin"):
        corpus = prepare((str(name),), vocab_size=V, cache=tmp_path / "cache")
        assert corpus.train[:].tolist() == np.concatenate(shards).tolist()
        assert corpus.val[:].tolist() == some_ids(64, seed=9).tolist()


def test_without_validation_files_blocks_are_held_out(tmp_path):
    """5% of the tokens, evenly spaced, are no training tokens any more; --val-bytes caps them; --val wins."""
    ids = np.arange(100_000) % 60_000
    path = nanogpt(tmp_path / "all.bin", ids)
    corpus = prepare((str(path),), vocab_size=60_000, cache=tmp_path / "cache")
    assert len(corpus.val) == 5000 and len(corpus.train) == 95_000
    few = prepare((str(path),), vocab_size=60_000, val_bytes=1024, cache=tmp_path / "cache")
    assert len(few.val) == 512 and sorted([*few.val[:], *few.train[:]]) == sorted(ids)
    other = nanogpt(tmp_path / "other.bin", range(70))
    given = prepare((str(path),), val=(str(other),), vocab_size=60_000, cache=tmp_path / "cache")
    assert len(given.train) == 100_000 and given.val[:].tolist() == list(range(70))


@pytest.mark.parametrize(("total", "keep"), [(20_000, 1), (20_000, 999), (300_000, 150_000), (1_000_001, 140_000)])
def test_held_out_blocks_lie_evenly(total, keep):
    """Both sides together are all tokens once; the blocks of one size begin at the first token and end at the last."""
    parts = np.split(np.arange(total), [total // 3])
    rest, held = hold_out(Tokens.of(parts), keep)
    assert sorted([*rest[:], *held[:]]) == list(range(total))
    starts = [held[:][0], *(b for a, b in zip(held[:-1], held[1:], strict=True) if b != a + 1)]
    block = min(65_536, keep)
    assert len(held) == len(starts) * block <= keep < len(held) + block
    assert starts[0] == 0 and (len(starts) == 1 or held[:][-1] == total - 1)
    gaps = np.diff(starts)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_a_long_validation_file_is_thinned(tmp_path):
    """Of a val.bin above --val-bytes evenly spaced blocks are kept, and the same ones every time."""
    path = nanogpt(tmp_path / "train.bin", some_ids(1000))
    nanogpt(tmp_path / "val.bin", np.arange(40_000))
    one, two = (prepare((str(path),), vocab_size=40_000, val_bytes=2048, cache=tmp_path / "cache") for _ in "ab")
    assert len(one.val) == 1024 and one.val_sha == two.val_sha


def test_fingerprint_is_that_of_the_tokens(tmp_path):
    """A changed id, another type of the same bytes and another validation file show in the fingerprints; place and
    name do not."""
    ids = some_ids(1000) % 100
    first = megatron(tmp_path / "train.bin", ids, code=8)
    elsewhere = megatron(tmp_path / "moved.bin", ids, code=8)
    one, two = (prepare((str(p),), vocab_size=V, cache=tmp_path) for p in (first, elsewhere))
    assert (one.data_sha, one.val_sha) == (two.data_sha, two.val_sha)
    signed = prepare((str(megatron(tmp_path / "signed.bin", ids, code=3)),), vocab_size=V, cache=tmp_path)
    ids[500] += 1
    changed = prepare((str(megatron(tmp_path / "changed.bin", ids, code=8)),), vocab_size=V, cache=tmp_path)
    assert len({one.data_sha, signed.data_sha, changed.data_sha}) == 3
    other = nanogpt(tmp_path / "other.bin", some_ids(100, seed=3))
    assert prepare((str(first),), val=(str(other),), vocab_size=V, cache=tmp_path).val_sha != one.val_sha


# ---------------------------------------------------------------------------------------------------------------------
# Training on them


@every_format
def test_every_format_trains(tiny, tmp_path, write):
    """A model learns the ids of each format: its loss falls below that of guessing; the record says what it read, the
    sample is ids, and the same command finds the run finished."""
    path = write(tmp_path / "train.bin", some_ids(30_000))
    config = tiny(data=(str(path),), vocab_size=V, lr=0.03)
    summary = train.train(config, quiet=True)
    assert summary["loss"] < 0.8 * np.log(V) and summary["val_bpb"] is None and summary["tokenizer"] == "ids-300"
    folder = Path(config.out) / summary["name"]
    format = {nanogpt: "nanoGPT", megatron: "Megatron"}.get(write, "llm.c")
    assert read_json(folder / "config.json")["corpus"]["format"] == format
    _, tokenizer, _ = checkpoint.load_run(folder)
    assert tokenizer.decode([7, 299]) == "7 299" and tokenizer.encode(b"7 299").tolist() == [7, 299]
    assert train.train(config, quiet=True) == summary


def test_training_equals_that_on_the_text(tiny, tmp_path):
    """Our own shards of a text are nanoGPT's format: trained on as such, with the tokenizer's name, they give the
    losses, the bits per byte and the sample of the run on the text."""
    text = tiny(name="text", eval_every=50)
    expected = train.train(text, quiet=True)
    shards = prepare(text.data, val_bytes=text.val_bytes, cache=text.cache).folder
    for side in ("train", "val"):
        os.link(shards / f"{side}-00000.bin", tmp_path / f"{side}.bin")
    config = tiny(
        name="tokens", eval_every=50, data=(str(tmp_path / "train.bin"),), tokenizer="bytes", val_bytes=1 << 20
    )
    found = train.train(config, quiet=True)
    rows = [
        [
            {key: row[key] for key in row if key not in ("tokens_per_s", "mfu")}
            for row in runs.read_log(Path(c.out, c.name))
        ]
        for c in (text, config)
    ]
    assert rows[0] == rows[1] and found["val_bpb"] == expected["val_bpb"]


def test_a_stopped_run_goes_on(tiny, tmp_path, monkeypatch):
    """A run on token files that was interrupted ends in the weights of one that was not; with a changed id it is
    refused as another run."""
    path = nanogpt(tmp_path / "train.bin", some_ids(5000))
    options = {"data": (str(path),), "vocab_size": V, "save_steps": (40,), "keep": 9}
    whole = tiny(name="whole", **options)
    train.train(whole, quiet=True)
    stopped = tiny(name="stopped", **options)
    real, steps = train.train_step, []
    monkeypatch.setattr(train, "train_step", lambda *a: steps.append(1) or (1 / (len(steps) < 60) and real(*a)))
    with pytest.raises(ZeroDivisionError):
        train.train(stopped, quiet=True)
    monkeypatch.setattr(train, "train_step", real)
    train.train(stopped, quiet=True)
    a, b = (Path(c.out, c.name, "checkpoints/step-100/model.safetensors").read_bytes() for c in (whole, stopped))
    assert a == b
    ids = some_ids(5000)
    ids[17] += 1
    nanogpt(path, ids)
    with pytest.raises(UserError, match="holds a run with data_sha"):
        train.train(stopped, quiet=True)


def test_evaluate_reads_them_too(tiny, tmp_path, command):
    """`nanochin.evaluate` on a token file gives the loss of the run's own validation set."""
    path = nanogpt(tmp_path / "train.bin", some_ids(5000))
    val = nanogpt(tmp_path / "val.bin", some_ids(500, seed=2))
    config = tiny(name="run", data=(str(path),), vocab_size=V)
    loss = train.train(config, quiet=True)["loss"]
    done = command("-m", "nanochin", "evaluate", Path(config.out) / "run", "--data", val)
    assert done.stdout.startswith(f"run: loss {loss:.4f} nats per token, bits per byte unknown"), done.stderr
    done = command("-m", "nanochin", "sample", Path(config.out) / "run", "--prompt", "1 2 dog")
    assert done.returncode == 2 and "'dog' is not a token id below 300" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_ids_beyond_the_vocabulary_are_named(tmp_path, monkeypatch):
    """File, position and value of the first id that the vocabulary lacks, wherever it lies, also a negative one; the
    id below the vocabulary by one is none."""
    monkeypatch.setattr(module, "SCAN", 64)
    nanogpt(tmp_path / "train_0.bin", some_ids(1000))
    ids = some_ids(1000, seed=1)
    ids[[700, 999]] = V, 60_000
    nanogpt(tmp_path / "train_1.bin", ids)
    data = (str(tmp_path),)
    with pytest.raises(UserError, match=r"train_1\.bin: token id 300 at position 700 is beyond the vocabulary .* 300"):
        prepare(data, vocab_size=V, cache=tmp_path)
    with pytest.raises(UserError, match=r"train_1\.bin: token id 60000 at position 999 .*`vocab_size` 301"):
        prepare(data, vocab_size=V + 1, cache=tmp_path)
    with pytest.raises(UserError, match=r"train_0\.bin: token id \d+ at position \d+ .*`tokenizer` bytes has 256"):
        prepare(data, tokenizer="bytes", cache=tmp_path)
    assert len(prepare(data, vocab_size=60_001, cache=tmp_path).train) == 1900
    ids[3] = -1
    with pytest.raises(UserError, match=r"m\.bin: token id -1 at position 3 "):
        prepare((str(megatron(tmp_path / "m.bin", ids, code=4)),), vocab_size=2**20, cache=tmp_path)


def wrong_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that none of the formats allows, and what the error says of each."""
    ids = some_ids(100)
    odd, empty, short = folder / "odd.bin", folder / "empty.bin", folder / "short.bin"
    odd.write_bytes(bytes(101))
    empty.touch()
    short.write_bytes(llm_c(short, ids).read_bytes()[:1100])
    header = folder / "header.bin"
    header.write_bytes(llm_c(header, ids).read_bytes()[:500])
    stump = megatron(folder / "stump.bin", ids)
    stump.with_suffix(".idx").write_bytes(b"MMIDIDX\0\0short")
    blank = nanogpt(folder / "blank.bin", ids)
    blank.with_suffix(".idx").touch()
    packed = folder / "packed.bin.gz"
    packed.write_bytes(gzip.compress(bytes(100)))
    cut = megatron(folder / "cut.bin", ids)
    os.truncate(cut, 150)
    return {
        "odd size": (odd, r"odd\.bin: 101 bytes, an odd number"),
        "packed": (packed, r"packed\.bin\.gz: unpack it first"),
        "empty": (empty, r"empty\.bin: empty"),
        "llm.c cut short": (short, r"short\.bin: 1100 bytes, but 1024 \+ 2 x the 100 tokens of its header make 1224"),
        "llm.c cut in its header": (header, r"header\.bin: 500 bytes, but"),
        "llm.c too long": (llm_c(folder / "long.bin", ids, count=99), "make 1222; it is damaged"),
        "llm.c without tokens": (llm_c(folder / "none.bin", [], count=0), r"none\.bin: 1024 bytes, but"),
        "llm.c of another version": (llm_c(folder / "v.bin", ids, version=2), r"version 2 of llm\.c's magic 20240520"),
        "uint16 as Llama 3": (llm_c(folder / "l.bin", ids, 20240801, 7), r"1224 bytes, but 1024 \+ 4 x"),
        "evaluation set": (llm_c(folder / "eval.bin", ids, 20240522), r"magic 20240522 is llm\.c's format of eval"),
        "llm.c's model": (llm_c(folder / "model.bin", [0] * 100, 20240326, 3), "magic 20240326 is not one of training"),
        "no index": (megatron(folder / "i.bin", ids, magic=b"SOMETHING"), r"i\.idx: not Megatron's index"),
        "an empty index": (blank, r"blank\.idx: not Megatron's index"),
        "a stump of an index": (stump, r"stump\.idx: 14 bytes, less than its header; it does not belong to"),
        "Megatron version 2": (megatron(folder / "m2.bin", ids, version=struct.pack("<Q", 2)), "version 2 of Megatron"),
        "floats": (megatron(folder / "f.bin", ids, code=6), "type code 6 is no integer"),
        "floats of gpt-neox": (megatron(folder / "g.bin", ids, code=7), "type code 7 is no integer"),
        "a longer index": (megatron(folder / "x.bin", ids, modes=True, magic=b"MMIDIDX\0\0", bounds=bytes(8)), "take"),
        "another .bin": (cut, r"cut\.idx: its sequences are 200 bytes long, .*cut\.bin 150"),
        "offsets": (megatron(folder / "o.bin", ids, offsets=np.array([0, 20, 99, 140]).astype("<i8").tobytes()),
                    "sequence 2 starts at byte 99, not where the one before it ends"),
        "documents": (megatron(folder / "d.bin", ids, bounds=np.array([0, 1, 2, 3, 9]).astype("<i8").tobytes()),
                      "its documents go from sequence 0 to 9, not in order from 0 to 4"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", [
    "odd size", "packed", "empty", "llm.c cut short", "llm.c cut in its header", "llm.c too long",
    "llm.c without tokens",
    "llm.c of another version", "uint16 as Llama 3", "evaluation set", "llm.c's model", "no index", "an empty index",
    "a stump of an index", "Megatron version 2", "floats", "floats of gpt-neox", "a longer index", "another .bin",
    "offsets", "documents"])  # fmt: skip
def test_files_that_no_format_allows(tmp_path, kind):
    """Each is one line that names the file and what is wrong with it."""
    path, said = wrong_files(tmp_path)[kind]
    with pytest.raises(UserError, match=said) as error:
        prepare((str(path),), vocab_size=65_536, cache=tmp_path / "cache")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


class Bomb:
    """Unpickling it makes the file `burst`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return Path.touch, (self.folder / "burst",)


def test_the_vocabulary_is_not_guessed_nor_unpickled(tmp_path):
    """Without --tokenizer or --vocab-size the ids mean nothing; meta.pkl is mentioned and never loaded, nor is a
    pickle that is named as data."""
    path = nanogpt(tmp_path / "train.bin", some_ids(100))
    with pytest.raises(UserError, match=r"train\.bin: what its ids mean is not in the file; give `tokenizer`"):
        prepare((str(path),), cache=tmp_path)
    meta = tmp_path / "meta.pkl"
    meta.write_bytes(pickle.dumps(Bomb(tmp_path)))
    with pytest.raises(
        UserError, match=r"meta\.pkl may know it, but is not read: a pickle can run any program\); give"
    ):
        prepare((str(path),), cache=tmp_path)
    with pytest.raises(UserError, match=r"meta\.pkl: not read: a pickle can run any program"):
        prepare((str(meta),), cache=tmp_path)
    prepare((str(tmp_path),), vocab_size=V, cache=tmp_path / "cache")  # the folder with both
    assert not (tmp_path / "burst").exists()
    pickle.loads(meta.read_bytes())
    assert (tmp_path / "burst").exists()  # it would have


def test_text_and_tokens_do_not_mix(tmp_path):
    """A folder that holds both is refused with one of each named; our own BPE cannot be trained on ids; --max-tokens
    is for hub data sets; too few tokens leave nothing to validate on."""
    path = nanogpt(tmp_path / "train.bin", some_ids(100))
    (tmp_path / "input.txt").write_text("text")
    with pytest.raises(UserError, match=r"train\.bin holds tokens, .*input\.txt text; name files of one kind"):
        prepare((str(tmp_path),), vocab_size=V, cache=tmp_path / "cache")
    with pytest.raises(UserError, match="`tokenizer` bpe: is trained on text, these are token files"):
        prepare((str(path),), tokenizer="bpe", cache=tmp_path / "cache")
    with pytest.raises(UserError, match="`max_tokens` 100: is for hf: data sets"):
        prepare((str(path),), vocab_size=V, max_tokens=100, cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r"few\.bin: too few tokens to keep some for validation; give `val`"):
        prepare((str(nanogpt(tmp_path / "few.bin", range(20))),), vocab_size=V, cache=tmp_path / "cache")
    with pytest.raises(UserError, match="`tokenizer` ids-300: is for token files, but"):
        prepare((str(tmp_path / "input.txt"),), tokenizer="ids-300", val_bytes=1024, cache=tmp_path / "cache")


def test_errors_are_one_line_of_the_command(tiny, tmp_path, refusal):
    """train.py refuses a file of a larger vocabulary in one line and leaves no folder of a run."""
    path = nanogpt(tmp_path / "train.bin", [*some_ids(5000), 50_256])
    config = tiny(data=(str(path),), vocab_size=V)
    assert "train.bin: token id 50256 at position 5000 is beyond the vocabulary" in refusal(*arguments(config))
    assert not Path(config.out).exists()
