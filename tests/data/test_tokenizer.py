"""Tokenizers: round trips, our BPE against tiktoken, and errors."""

import socket
import threading

import numpy as np
import pytest
import tiktoken
from conftest import pseudo_english

from nanochin.base.cli import UserError
from nanochin.data import tokenizer as module
from nanochin.data.tokenizer import END_OF_TEXT, PATTERN, RANKS_FILE, Tokenizer, model_vocab, train_bpe

# Every length of UTF-8 character, joined emoji, right-to-left, combining marks, odd spaces, line ends, a special name.
ODD = (
    "naïve ß Ω 中文字 🙂👨\u200d👩\u200d👧 עברית e\u0301 \u00a0\u2003\u3000x\r\n\n\t\tif  a:\r 1234567 "
    "don't 'tis <|endoftext|> \U0010ffff\x01"
)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([pseudo_english(200_000)], 600)


@pytest.fixture
def gpt2(tiktoken_ranks) -> Tokenizer:
    return Tokenizer.load("gpt2")


def test_bytes_are_their_own_ids():
    """The bytes vocabulary has exactly 256 ids, id = byte, and end-of-text is 0."""
    t = Tokenizer.load("bytes")
    assert (t.vocab_size, t.eot, t.dtype) == (256, 0, np.uint16)
    assert t.encode(ODD.encode()).tolist() == list(ODD.encode())
    assert t.decode_bytes(range(256)) == bytes(range(1, 256))


@pytest.mark.parametrize("name", ["bytes", "bpe", "gpt2"])
def test_round_trip(name, request):
    """decode(encode(text)) is the text, and an incomplete character decodes to U+FFFD instead of an error."""
    t = Tokenizer.load("bytes") if name == "bytes" else request.getfixturevalue(name)
    assert t.decode(t.encode(ODD.encode())) == ODD
    assert t.decode_bytes(t.encode(ODD.encode()).tolist()) == ODD.encode()
    assert t.encode(b"").tolist() == [] and t.decode([]) == ""
    smile = t.encode("🙂".encode()).tolist()
    assert len(smile) > 1 and "\ufffd" in t.decode(smile[:-1])


def test_bpe_counts_end_of_text_as_its_last_id(bpe):
    """A vocabulary of 600 is 256 bytes, 343 merges and end-of-text; text never encodes to end-of-text."""
    assert (bpe.vocab_size, bpe.eot, bpe.dtype) == (600, 599, np.uint16)
    ids = bpe.encode(END_OF_TEXT.encode()).tolist()
    assert bpe.eot not in ids and bpe.decode([bpe.eot, *ids, bpe.eot, 600, 10_000]) == END_OF_TEXT


def test_tiktoken_reads_saved_ranks(bpe, tmp_path):
    """tiktoken's own reader of the saved file, with our pattern, gives the same ids; so does `load`."""
    bpe.save(tmp_path)
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / RANKS_FILE))
    assert sorted(ranks.values()) == list(range(599))
    theirs = tiktoken.Encoding("theirs", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    text = pseudo_english(20_000, seed=1) + ODD
    for ours in (bpe, Tokenizer.load("bpe", tmp_path)):
        assert ours.encode(text.encode()).tolist() == theirs.encode_ordinary(text)


def test_bpe_training_is_deterministic(bpe):
    """The same text gives the same ranks, however it is split at spaces."""
    text = pseudo_english(200_000)
    middle = text.index(" ", len(text) // 2)
    assert train_bpe([text[:middle], text[middle:]], 600).encoding._mergeable_ranks == bpe.encoding._mergeable_ranks


def test_named_encodings_are_tiktokens(gpt2):
    """Named encodings give tiktoken's ids and its end-of-text; ids without a token (cl100k_base) decode to nothing."""
    assert (gpt2.vocab_size, gpt2.eot, gpt2.dtype) == (50257, 50256, np.uint16)
    assert gpt2.encode(b"hello world").tolist() == [31373, 995]
    assert gpt2.encode(ODD.encode()).tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(ODD)
    cl100k = Tokenizer.load("cl100k_base")
    assert (cl100k.dtype, cl100k.vocab_size) == (np.uint32, 100_277)
    assert cl100k.decode([*cl100k.encode(ODD.encode()), 100_256, 100_276]) == ODD


def test_model_vocab_pads_but_never_cuts(bpe):
    """`vocab_size` may exceed the tokenizer's ids (padding rows), but not be smaller."""
    assert (model_vocab(bpe, None), model_vocab(bpe, 640)) == (600, 640)
    with pytest.raises(UserError, match=r"`vocab_size` 599: tokenizer bpe has 600 ids"):
        model_vocab(bpe, 599)


def test_ids_as_text():
    """The text of `ids-N` is numbers below N, else an error names the word. More than 2^16 ids need 32 bits."""
    t = Tokenizer.load("ids-300")
    assert t.decode([7, 299]) == "7 299" and t.encode(b"7 299").tolist() == [7, 299]
    for text in ("1 2 dog", "1 300"):
        with pytest.raises(UserError, match=f"'{text.split()[-1]}' is not a token id below 300"):
            t.encode(text.encode())
    assert (Tokenizer.load("ids-65536").dtype, Tokenizer.load("ids-65537").dtype) == (np.uint16, np.uint32)


def test_vocabularies_that_cannot_be_trained():
    """A short text cannot fill the vocabulary; 257 ids, bytes and end-of-text, need none."""
    with pytest.raises(UserError, match=r"`vocab_size` 400: the text gives only 260"):
        train_bpe([" aab" * 500], 400)
    assert train_bpe(["anything"], 257).encode(b"any").tolist() == [*b"any"]


def test_damaged_ranks_are_named(tmp_path):
    """A rank file that is missing, truncated, other ranks, a folder or something else is named, not decoded."""
    with pytest.raises(UserError, match=r"tokenizer\.tiktoken: missing"):
        Tokenizer.load("bpe", tmp_path)
    for damage in (b"", b"not ranks\n", b"QQ== 0\n", b"YQ== x\n"):
        (tmp_path / RANKS_FILE).write_bytes(damage)
        with pytest.raises(UserError, match=r"tokenizer\.tiktoken: corrupted"):
            Tokenizer.load("bpe", tmp_path)
    one, other = train_bpe(["anything"], 257), train_bpe(["aaaa bbbb" * 9], 258)
    one.save(tmp_path)
    assert Tokenizer.load("bpe", tmp_path, one.sha).sha == one.sha != other.sha
    with pytest.raises(UserError, match=r"tokenizer\.tiktoken: corrupted"):
        Tokenizer.load("bpe", tmp_path, other.sha)
    (tmp_path / RANKS_FILE).unlink()
    (tmp_path / RANKS_FILE).mkdir()
    with pytest.raises(UserError, match=r"tokenizer\.tiktoken: cannot be read \(Is a directory\)"):
        Tokenizer.load("bpe", tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.tiktoken: cannot write: Is a directory"):
        one.save(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("silent", [True, False])
def test_no_network_and_no_cache(monkeypatch, tmp_path, silent):
    """tiktoken's cache is empty, and the network is a proxy that never answers, or refuses connections: one line."""
    server, before = socket.create_server(("127.0.0.1", 0)), set(threading.enumerate())
    monkeypatch.setattr(module, "DOWNLOAD_SECONDS", 0.3)
    proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
    environment = {"TIKTOKEN_CACHE_DIR": str(tmp_path), "NO_PROXY": "", "HTTPS_PROXY": proxy, "https_proxy": proxy}
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with server:
        if not silent:
            server.close()
        with pytest.raises(UserError, match="^`tokenizer` p50k_edit: .*TIKTOKEN_CACHE_DIR.*$") as error:
            Tokenizer.load("p50k_edit")
    assert ("no answer" in str(error.value)) == silent
    for thread in set(threading.enumerate()) - before:  # the download fails now and releases tiktoken's lock
        thread.join(10)
