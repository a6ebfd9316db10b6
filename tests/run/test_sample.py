"""Sampling: the cache against the full forward pass, the distribution of tokens, the text, the command."""

import contextlib
import itertools
import os
import sys

import pytest
import torch

import train
from nanochin.__main__ import run
from nanochin.base.cli import UserError
from nanochin.config import make_shape
from nanochin.data.tokenizer import Tokenizer
from nanochin.model import GPT
from nanochin.run import sample
from nanochin.run.sample import Cache, draw, generate, next_tokens, text_of

pytestmark = pytest.mark.usefixtures("one_thread")
BYTES = Tokenizer("bytes")


def made(T: int = 16, V: int = 31, **options) -> GPT:
    """A model whose parameters are all random and whose logits differ clearly."""
    model = GPT(make_shape(32, 3, vocab_size=V, seq_len=T, head_size=8, **options))
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 2 else 0.5) + (p.ndim == 1)
    return model.eval()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu2", "swiglu"])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_cached_logits_are_those_of_the_full_pass(positions, norm, activation):
    """To 1e-5 of their size in float32, after a prompt and then token by token to a full context, for every shape."""
    for bias, tied in itertools.product((False, True), repeat=2):
        options = {"bias": bias, "tied": tied, "qk_norm": bias ^ tied}
        model = made(positions=positions, norm=norm, activation=activation, **options)
        tokens = torch.randint(31, (2, 16), generator=torch.Generator().manual_seed(1))
        cache, start = Cache(model, batch=2), 5
        with torch.no_grad():
            full = model(tokens)[:, start - 1 :]
            cached = [cache.logits(tokens[:, :start])] + [cache.logits(tokens[:, t, None]) for t in range(start, 16)]
        assert full.std() > 0.5
        assert (torch.stack(cached, 1) - full).abs().max() < 1e-5 * full.abs().max(), options


@pytest.mark.parametrize("T", [1, 2, 9])
@pytest.mark.parametrize("prompt", [1, 9, 12])
def test_greedy_tokens_and_a_full_context(T, prompt):
    """Greedy tokens are the argmax of the full pass, on the context by the rule: at first the last seq_len tokens, and
    when it is full, its last seq_len // 2."""
    model = made(T, positions="learned", tied=False)
    prompt = torch.arange(prompt) % 31
    ids, context = prompt.tolist(), prompt.tolist()[-T:]
    with torch.no_grad():
        for _ in range(25):
            if len(context) > T:
                context = context[-max(1, T // 2) :]
            following = int(model(torch.tensor([context]))[0, -1].argmax())
            ids, context = [*ids, following], [*context, following]
    assert T < 9 or len(set(ids[-25:])) > 3  # no repetition that hides an error
    for settings in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}, {"temperature": 1e-300}):
        assert generate(model, prompt, 25, **settings).tolist() == ids, settings


def shares(logits: torch.Tensor, **how) -> torch.Tensor:
    """Shares of 4000 draws."""
    draws = draw(logits.expand(4000, -1), torch.Generator().manual_seed(0), **how)
    return torch.bincount(draws, minlength=len(logits)) / 4000


@pytest.mark.parametrize(
    ("how", "weights"),
    [
        ({"top_k": 0}, [5, 3, 1, 1]),  # shares 0.5, 0.3, 0.1, 0.1
        ({"top_k": 2}, [5, 3, 0, 0]),
        ({"top_p": 0.49}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [5, 3, 0, 0]),
        ({"top_p": 0.79}, [5, 3, 0, 0]),
        ({"top_p": 0.99}, [5, 3, 1, 1]),
        ({"top_p": 0.6, "top_k": 2}, [1, 0, 0, 0]),  # of the two, the first has 5/8
        ({"top_p": 0.69, "temperature": 0.5}, [1, 0, 0, 0]),  # of all, it has 25/36
        ({"top_p": 0.72, "temperature": 0.5, "top_k": 2}, [1, 0, 0, 0]),  # of the two, 25/34
        ({"temperature": 2.0}, [5**0.5, 3**0.5, 1, 1]),
        ({"temperature": 1e-300}, [1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(how, weights):
    """Shares are those computed by hand, in every order of the tokens and for logits of any size."""
    expected = torch.tensor(weights) / sum(weights)
    for order in ([0, 1, 2, 3], [2, 1, 3, 0]):
        found = shares(torch.tensor([0.5, 0.3, 0.1, 0.1])[order].log() + 300, **{"temperature": 1.0} | how)
        wanted = expected[order]
        assert (found - wanted).abs().max() < 4 * (0.25 / 4000) ** 0.5
        assert bool(((found == 0) | (wanted > 0)).all())


def test_samples_differ_and_repeat_by_seed():
    """Each sample is its own draw; a seed gives the same samples again, another seed others, also past the context."""
    model = made()

    def samples(seed):
        steps = next_tokens(model, torch.tensor([3]), 40, samples=3, seed=seed, temperature=1.5)
        return list(map(tuple, torch.stack(list(steps), 1).tolist()))

    first = samples(0)
    assert samples(0) == first and len({*first, *samples(1)}) == 6 and len(first[0]) == 40


def test_samples_do_not_mix():
    """Every sample, decoded with others, follows from its own tokens alone."""
    model, T = made(), 16
    steps = next_tokens(model, torch.tensor([3, 4]), T - 2, samples=3, temperature=3.0, top_k=2)
    rows = torch.stack(list(steps), 1)
    tokens = torch.cat((torch.tensor([3, 4]).expand(3, -1), rows), 1)
    with torch.no_grad():
        best = model(tokens[:, :-1])[:, 1:].topk(2).indices
    assert len(set(map(tuple, rows.tolist()))) == 3
    assert bool((best == rows[..., None]).any(-1).all())


def test_text_comes_in_whole_characters():
    """Bytes of a character are held until it is complete; what is not UTF-8 is U+FFFD, also at the end."""
    text = "é中🙂"
    pieces = list(text_of(text.encode(), BYTES))
    assert [piece for piece in pieces if piece] == list(text) and len(pieces) == 10
    assert "".join(text_of(b"a\xffb\xe4\xb8c\xf0\x9f", BYTES)) == "a\ufffdb\ufffdc\ufffd"
    assert "".join(text_of(b"ab\x00cd", BYTES)) == "ab"  # end-of-text
    assert "".join(text_of([0, 7, 0, 12], Tokenizer("ids-50"))) == " 0 7 0 12"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((), "one\n\ntwo"),
        (("\n\n",), "one"),
        (("tw", "e"), "on"),
        (("\n\nx", "wo"), "one\n\nt"),
        (("two!", "中"), "one\n\ntwo"),
        (("one",), ""),
    ],
)
def test_stop_strings(stop, text):
    """A sample ends before the first stop string, however tokens cut it; its beginning alone ends nothing."""
    assert "".join(text_of(b"one\n\ntwo", BYTES, stop)) == text


def test_stop_strings_of_longer_tokens(tiktoken_ranks):
    """A stop string may begin and end inside tokens."""
    gpt2 = Tokenizer.load("gpt2")
    ids = gpt2.encode(b"Hello world, hello again.").tolist()
    assert len(ids) < 10
    assert "".join(text_of(ids, gpt2, ("ld, he",))) == "Hello wor"
    assert "".join(text_of([*ids, gpt2.eot, *ids], gpt2)) == "Hello world, hello again."


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def said(tiny, capsys, tmp_path, monkeypatch):
    """`said("--tokens=5", stdin=b"...")`: what the command prints about an untrained run; with `terminal`, both streams
    seem to be one."""
    config = tiny(name="run", tokens=128.0)
    train.train(config, quiet=True)
    capsys.readouterr()

    def command(*argv: str, stdin: bytes = b"", terminal: bool = False) -> str:
        path = tmp_path / "stdin"
        path.write_bytes(stdin)
        with contextlib.ExitStack() as stack, open(path, "rb") as file:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            before = os.dup(0)
            stack.callback(lambda: (os.dup2(before, 0), os.close(before)))
            os.dup2(file.fileno(), 0)
            if terminal:
                patch.setattr(sys.stdout, "isatty", lambda: True)
                patch.setattr(os, "isatty", lambda _: True)
            run("sample", "run", f"--out={config.out}", "--tokens=9", "--top-k=0", *argv)
        return capsys.readouterr().out

    return command


def test_a_prompt_is_the_beginning_of_a_document(said, monkeypatch):
    """The context begins with end-of-text, and so does a sample without a prompt."""
    seen = []

    def nothing(model, ids, *_, **__):
        seen.append(ids.tolist())
        return iter(())

    monkeypatch.setattr(sample, "next_tokens", nothing)
    assert said("--prompt=ab") == "ab\n" and said() == "\n" and said("--prompt=-", stdin=b"x\ny") == "x\ny\n"
    assert said("--prompt=a\udcff") == "a\ufffd\n" and said("--prompt=-", stdin=b"\xff") == "\ufffd\n"
    assert seen[:3] == [[0, 97, 98], [0], [0, *b"x\ny"]] and seen[3][1:] == list("a\ufffd".encode())


def test_a_terminal_asks_for_prompts(said):
    """Every line is continued, with a seed of its own, until the end of the input."""
    first, second = said("--prompt=ab"), said("--prompt=ab", "--seed=1")
    assert first != second
    hint, *rest = said(stdin=b"ab\nab\n", terminal=True).split("> ")
    assert hint.count("\n") == 1 and "".join(rest) == first + second + "\n"


def test_several_samples_are_printed_one_after_the_other(said):
    """Each under its heading; --stop ends each; the same seed gives the same text."""
    many = said("--prompt=ab", "--num-samples=3")
    parts = [part.split(" -----\n")[1] for part in many.split("----- sample ")[1:]]
    assert len(set(parts)) == 3 and all(part.startswith("ab") and part.endswith("\n") for part in parts)
    assert said("--prompt=ab", "--num-samples=3") == many
    letter = next(c for c in parts[0][3:] if c.isascii() and c.isprintable())
    whole, cut = said("--prompt=", "--tokens=60"), said("--prompt=", "--tokens=60", f"--stop={letter}")
    assert cut == whole.split(letter)[0].removesuffix("\n") + "\n"


def test_tiny_temperatures_are_greedy(said):
    assert said("--temperature=0") == said("--temperature=1e-40") == said("--temperature=1e-300")


@pytest.mark.parametrize("option", ["--stop=", "--top-p=0", "--top-p=1.1", "--num-samples=0", "--temperature=-1"])
def test_errors(said, option):
    with pytest.raises((UserError, SystemExit)):
        said(option)
