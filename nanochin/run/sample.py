"""Sample text from a run: python -m nanochin sample RUN --prompt "def " """

from dataclasses import dataclass

import torch
from torch import Tensor

from nanochin.base.cli import opt, parse
from nanochin.model import GPT
from nanochin.run.checkpoint import load_run
from nanochin.run.folder import find_run


@dataclass(frozen=True)
class SampleOptions:
    run: str = opt(None, "folder of the run, or its name under --out", positional=True)
    prompt: str = opt("", "text to continue; default: the start of a document")
    tokens: int = opt(256, "tokens to generate", low=1)
    temperature: float = opt(0.8, "1 samples the model's own distribution, 0 is greedy", low=0)
    top_k: int = opt(50, "sample from the k most likely tokens; 0 = all", low=0)
    seed: int = opt(0, "seed of the sampling", low=0, high=10**9)
    out: str = opt("runs", "folder of all runs")


@torch.no_grad()
def generate(
    model: GPT, prompt: Tensor, tokens: int, *, temperature: float = 0.8, top_k: int = 50, seed: int = 0
) -> Tensor:
    """Continue `prompt` (T,) by `tokens` tokens -> (T + tokens,). The context is the last seq_len tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = prompt
    for _ in range(tokens):
        logits = model(ids[None, -model.shape.seq_len :])[0, -1].cpu()  # (V,)
        if temperature == 0:
            following = logits.argmax()[None]
        else:
            if 0 < top_k < len(logits):
                logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
            following = torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)
        ids = torch.cat((ids, following.to(ids.device)))
    return ids


def main(argv: list[str] | None = None) -> None:
    options = parse(SampleOptions, argv, prog="python -m nanochin sample", description=__doc__)
    model, tokenizer, _ = load_run(find_run(options.run, options.out))
    ids = tokenizer.encode(options.prompt.encode()) if options.prompt else [tokenizer.eot]
    settings = {"temperature": options.temperature, "top_k": options.top_k, "seed": options.seed}
    ids = generate(model, torch.tensor([int(i) for i in ids]), options.tokens, **settings)
    print(tokenizer.decode(ids[0 if options.prompt else 1 :].tolist()))
