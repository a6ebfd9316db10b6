"""The names of our parameters in the architectures of `transformers`."""

NAMES = {  # ours: GPT-2, GPT-NeoX, Llama
    "embed": ("transformer.wte", "gpt_neox.embed_in", "model.embed_tokens"),
    "positions": ("transformer.wpe", None, None),
    "head": ("lm_head", "embed_out", "lm_head"),
    "final": ("transformer.ln_f", "gpt_neox.final_layer_norm", "model.norm"),
    "blocks": ("transformer.h", "gpt_neox.layers", "model.layers"),
    "norm1": ("ln_2", "post_attention_layernorm", "post_attention_layernorm"),
    "norm2": ("ln_1", "input_layernorm", "input_layernorm"),
    "attention.qkv": ("attn.c_attn", "attention.query_key_value", "self_attn.{}_proj"),
    "attention.out": ("attn.c_proj", "attention.dense", "self_attn.o_proj"),
    "feed_forward.up": ("mlp.c_fc", "mlp.dense_h_to_4h", "mlp.{}_proj"),
    "feed_forward.down": ("mlp.c_proj", "mlp.dense_4h_to_h", "mlp.down_proj"),
}
GPT2, NEOX, LLAMA = (dict(zip(NAMES, column, strict=True)) for column in zip(*NAMES.values(), strict=True))


def rename(name: str, layers: int, names: dict[str, str]) -> str:
    """Our parameter `name` in the architecture with these `names`. Our norms belong to the block before them: norm2 is
    the first norm of the next block elsewhere, or the final norm."""
    module, _, kind = name.rpartition(".")  # kind: weight or bias
    if module in ("embed", "positions", "head"):
        return f"{names[module]}.{kind}"
    _, block, part = module.split(".", 2) if module != "norm" else ("", -1, "norm2")
    block = int(block) + (part == "norm2")
    return f"{names['final']}.{kind}" if block == layers else f"{names['blocks']}.{block}.{names[part]}.{kind}"
