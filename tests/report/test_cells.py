"""Names of columns and cells with numbers: what is read, what is proposed, what is refused."""

import math
import shlex

import pytest

from nanochin.base.cli import UserError
from nanochin.base.console import count
from nanochin.report.cells import NEEDED, find_columns, parse_columns, read_count, read_number, read_numbers


def refused(header: str, columns: str | None = None, needed=NEEDED) -> str:
    with pytest.raises(UserError) as error:
        find_columns("runs.csv", header.split(","), needed, parse_columns(columns))
    text = str(error.value)
    assert "\n" not in text and text.startswith("runs.csv: ")
    return text


def test_columns_option():
    """Pairs of ours and theirs; each name once, and ours must exist. One column may serve as N and as another count,
    but not as two of those needed."""
    assert parse_columns("params=N, tokens=my D") == {"params": "N", "tokens": "my D"} and parse_columns(None) == {}
    for text in ("params=", "parms=N", "params=N,params=M", "params=N,tokens=N"):
        with pytest.raises(UserError, match="`columns`"):
            parse_columns(text)
    spots = find_columns(
        "", ["params_non_embedding", "D", "loss"], NEEDED, {"params": "params_non_embedding", "tokens": "D"}
    )
    assert spots == {"params_non_embedding": 0, "params": 0, "tokens": 1, "loss": 2}
    assert "params and tokens" in refused("params,tokens,loss", "params=tokens")
    assert "'E'" in refused("params,tokens,loss", "tokens=E")
    assert "2 times" in refused("params,tokens,loss,loss")


@pytest.mark.parametrize(
    "header, proposed",
    [
        ("params,Tokens,loss", "tokens=Tokens"),
        ("params,tokens,val_loss", "loss=val_loss"),
        ("parms,tokens,losss", "params=parms,loss=losss"),
        ("N,D,C,L,d,n", "params=N,tokens=D,loss=L,flops=C"),
        (
            "Model Size,Training Tokens,Training FLOP,loss",
            "params=Model Size,tokens=Training Tokens,flops=Training FLOP",
        ),
        ("parameters,compute_budget,final_loss", "params=parameters,loss=final_loss,budget=compute_budget"),
        ("tokenizer,n_params,compute,train_loss,eval_loss", "params=n_params,loss=eval_loss,flops=compute"),
        ("params,loss,tokenizer,training_flops", "flops=training_flops"),
        ("n_tokens,flops,bpb", "tokens=n_tokens,loss=bpb"),
        (
            "flops_budget,depth,model_dim,num_params,num_scaling_params,num_iterations,tokens_trained,val_bpb",
            "params=num_params,tokens=tokens_trained,loss=val_bpb,budget=flops_budget",
        ),
    ],
)
def test_a_whole_mapping_is_proposed(header, proposed):
    """What the error proposes can be pasted, and finds the columns. Tokens are not needed if FLOPs are there."""
    text = refused(header)
    option = text.partition("did you mean `columns` ")[2].removesuffix("?")
    assert shlex.split(option) == [proposed]
    find_columns("runs.csv", header.split(","), NEEDED, parse_columns(proposed))


@pytest.mark.parametrize(
    "header, option",
    [
        ("params,loss,tokenizer,seq_len", "tokens=..."),
        ("params,tokens_m,loss,batch_tokens,unique_tokens", "tokens=..."),
        ("N,D,accuracy,loss_std", "params=N,tokens=D,loss=..."),
        ("n,d,l", "params=...,tokens=...,loss=..."),
        ("log10_params,tokens,loss", "params=..."),
    ],
)
def test_no_wrong_column_is_proposed(header, option):
    """Another quantity with a similar name is left for the user to name. Pairs that are given remain."""
    assert refused(header).endswith(f"; set `columns` {option}")
    assert refused("size,tokens,x,y", "params=size").endswith("`columns` params=size,loss=...")


def test_only_columns_needed():
    """A table of FLOPs and loss, if only these are needed; budgets are FLOPs too."""
    assert find_columns("", ["budget", "loss"], ("flops", "loss"), {}) == {"budget": 0, "flops": 0, "loss": 1}
    assert find_columns("", ["budget", "loss", "flops"], ("flops", "loss"), {})["flops"] == 2
    assert "`columns` flops=compute,loss=val_loss" in refused("compute,val_loss", needed=("flops", "loss"))
    assert refused("a\nb,loss\x1b").endswith(
        "among a b, loss ; set `columns` params=...,tokens=...,loss=..."
    )  # on one line


@pytest.mark.parametrize(
    "header, wide",
    [
        ("dim,1e+18,3e+18,1e+19", True),
        (",125M,1.3B", True),
        ("params,step_1000,step_2000,step_3000", True),
        ("width,beta1,beta2", False),
        ("params,tokens,1,2,3,perplexity", True),
        ("N,D,1,2,3,final_loss", False),
    ],
)
def test_wide_tables(header, wide):
    """Values as names of columns: the error says so, unless the needed columns are there too."""
    text = refused(header)
    assert ("wide" in text) == wide and ("melt" in text) == wide


def test_counts():
    """As the project prints them, with thousands commas, or as Python reads them; nothing else."""
    for number in (12, 1000, 22.8e6, 0.456e9, 1.5e12, 999e12, 7_654_321):
        assert read_count(count(number)) == pytest.approx(number, rel=5e-3)
    known = {"22.8M": 22.8e6, "0.456B": 456e6, "1.5 T": 1.5e12, "12k ": 12e3, "160m": 160e6, ".5K": 500}
    known |= {"1,024,000": 1_024_000, " 1,024.5": 1024.5, "1_000": 1000, "1e3": 1000}
    assert {text: read_count(text) for text in known} == known
    for text in ("", "1,02", "1,0240", ",123", "1,2,3", "12 MB", "M", "1e3k", "1.5.2M", "\uff11\uff12", "0x10"):
        assert math.isnan(read_count(text)), text
    for text in ("3.1k", "3,646", "\uff13"):  # losses are no counts
        assert math.isnan(read_number(text))


def test_cells():
    """Optional cells may be blank, also as a dash. A decimal comma is called that, also if it could be a thousands
    comma in a loss. Bounds are far outside of what can be, and within what the fits compute without overflow."""

    def read(*cells: str) -> list[float]:
        return list(read_numbers(list(cells), 4, {"params": 0, "tokens": 1, "loss": 2, "flops": 3}, NEEDED).values())

    for blank in ("", " ", "-", "\u2014", "\u2013", "NaN", "n/a", "null"):
        values = read("22.8M", "1,000", "3.5", blank)
        assert values[:3] == [22.8e6, 1000, 3.5] and math.isnan(values[3])
    assert read("1e40", "1e-9", "1e4", "1e40") == [1e40, 1e-9, 1e4, 1e40]
    for cells, says in [
        (("1", "1", "3,6463", ""), "decimal"),
        (("1", "1", "3,646", ""), "decimal"),
        (("1,5", "1", "3", ""), "params is '1,5', with a decimal"),
        (("1", "1", "31415", ""), "loss is '31415'"),
        (("1", "1", "1e-7", ""), "loss is '1e-7'"),
        (("1e41", "1", "3", ""), "params is '1e41'"),
        (("1", "1", "3", "1e-10"), "flops is '1e-10'"),
        (("1", "\u2014", "3", ""), "tokens is '\u2014'"),
        (("1", "1", "3"), "3 cells"),
    ]:
        with pytest.raises(ValueError, match=says):
            read(*cells)
