"""Sample text from a run: python -m nanochin sample RUN --prompt "def " """

import torch
from torch import Tensor

from nanochin.model import GPT
from nanochin.options import SampleOptions
from nanochin.run.checkpoint import load_run
from nanochin.run.folder import find_run


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


def main(options: SampleOptions) -> None:
    model, tokenizer, _ = load_run(find_run(options.run, options.out))
    ids = tokenizer.encode(options.prompt.encode()) if options.prompt else [tokenizer.eot]
    settings = {"temperature": options.temperature, "top_k": options.top_k, "seed": options.seed}
    ids = generate(model, torch.tensor([int(i) for i in ids]), options.tokens, **settings)
    print(tokenizer.decode(ids[0 if options.prompt else 1 :].tolist()))
