"""The shipped configurations of our Triton kernels, for bench.aot."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

CAPABILITIES = (80, 86, 89, 90, 100, 120)
# Types of arguments that are no constexpr, by name; all others are pointers to numbers of the dtype of the activations.
SCALARS = dict.fromkeys(("M", "V", "C", "F", "T", "H", "stride", "ignore_index"), "i32")
SCALARS |= dict.fromkeys(("eps", "scale", "z_loss"), "fp32")
POINTERS = dict.fromkeys(("W", "B", "Stats", "Partial", "Table", "R", "Loss"), "fp32") | {"Targets": "i64"}
POINTERS |= dict.fromkeys(("lse", "delta", "lse_m", "delta_m", "table", "r"), "fp32")
GATED_HEADS = {80: (64, 128), 86: (64, 128), 89: (64, 128), 90: (32, 64, 96, 128), 120: (64, 128)}  # most used


@dataclass(frozen=True)
class Build:
    """One configuration of one kernel, as `triton.compile` wants it. As at a launch, pointers count as 16-byte aligned
    and `i32` arguments as multiples of 16, save those named in `odd` (such as a number of heads)."""

    module: str
    label: str  # unique within the module
    kernel: object  # what @triton.jit made
    signature: dict[str, str]  # types of the arguments that are not constexpr
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    capabilities: tuple[int, ...] = ()  # targets that it ships on
    gate: bool = False  # one of the most used
    odd: tuple[str, ...] = ()


@functools.cache
def builds() -> list[Build]:
    """All shipped configurations."""
    return [*attention_builds(), *norm_builds(), *rotary_builds(), *activation_builds(), *cross_entropy_builds()]


def build(kernel, label: str, config: dict, *, gate: bool = False, dtype: str = "bf16", **more) -> Build:
    """`config` has num_warps, num_stages if not 3, and by argument what is constexpr: None for an absent tensor."""
    return Build(
        kernel.fn.__module__.removeprefix("kernels."),
        label,
        kernel,
        {name: type_of(name, dtype, config) for name in kernel.arg_names if name not in config},
        {name: config[name] for name in kernel.arg_names if name in config},
        config["num_warps"],
        config.get("num_stages", 3),
        gate=gate,
        **({"capabilities": CAPABILITIES if gate else (80, 90, 100)} | more),
    )


def type_of(argument: str, dtype: str, config: dict) -> str:
    if argument in SCALARS:
        return SCALARS[argument]
    kind = POINTERS.get(argument, dtype)
    if not config.get("TMA") or argument[-2:] not in ("_m", "_n"):
        return f"*{kind}"
    rows = config[f"BLOCK_{argument[-1].upper()}"]
    block = f"1, {rows}" if argument in ("lse_m", "delta_m") else f"1, 1, {rows}, {config['BLOCK_D']}"
    return f"tensordesc<{kind}[{block}]>"


def attention_builds() -> Iterator[Build]:
    """Every row of TILES on every target, head sizes that need padding, with and without positions."""
    import torch

    from kernels import attention

    cases = [(torch.bfloat16, 1024, D, " rotary") for D in (128, 64, 32, 16, 96, 24, 90, 50, 26, 10)]
    cases += [(torch.bfloat16, 1024, D, also) for D in (128, 64) for also in ("", " rotary qk-norm")]
    cases += [(dtype, T, D, " rotary") for dtype, T in ((torch.bfloat16, 64), (torch.float32, 1024)) for D in (128, 64)]
    for capability in (90, 80, 86, 89, 120, 100):
        target = attention.TARGETS.get(capability // 10, "sm_80")
        for dtype, T, D, also in cases:
            gate = T > 64 and dtype != torch.float32 and D in GATED_HEADS.get(capability, ()) and also == " rotary"
            absent = ([] if also else ["table"]) + ([] if "qk-norm" in also else ["r"])
            name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
            for kernel in attention.KERNELS if gate or capability in (80, 90, 100) else ():
                if kernel is attention.KERNELS[0] and "qk-norm" in also:
                    continue  # the forward does not see the norm
                config = attention.configure(kernel, target, dtype, T, D) | {"ROTATED": bool(also)}
                yield build(
                    kernel,
                    f"{kernel.__name__[1:]} {name} D{D} T{'<=' if T == 64 else '>'}64{also}",
                    config | dict.fromkeys(absent),
                    gate=gate,
                    dtype=name,
                    capabilities=(capability,),
                    odd=("T", "H"),
                )


def norm_builds() -> Iterator[Build]:
    """With the residual, weights in float32."""
    from kernels import norms

    for name, centred in (("add_rms_norm", False), ("add_layer_norm", True)):
        options = {"CENTRED": centred, "ADD": True, "BIAS": centred} | ({} if centred else {"B": None})
        for C in (384, 768, 1024, 2048, 4096, 8192):
            gate = C == 768 and not centred
            yield build(norms._forward, f"{name} forward bf16 C{C}", options | norms._forward_config(C), gate=gate)
            yield build(norms._backward, f"{name} backward bf16 C{C}", options | norms._backward_config(C), gate=gate)


def rotary_builds() -> Iterator[Build]:
    from kernels import rotary

    for D in (64, 128):
        for norm in (False, True):
            config = rotary._config(12, D) | {"ROTATE": True, "NORM": norm} | ({} if norm else {"R": None})
            label = f"rotary{' and qk-norm' * norm} for attention bf16 D{D}"
            yield build(rotary._rotate, label, config, gate=D == 64, odd=("H",))


def activation_builds() -> Iterator[Build]:
    from kernels import activation

    for kind in activation.KINDS:
        config = activation._config(2048) | {"KIND": kind}
        yield build(activation._forward, f"{kind} forward bf16", config)
        yield build(activation._backward, f"{kind} backward bf16", config)


def cross_entropy_builds() -> Iterator[Build]:
    from kernels import cross_entropy

    for V in (256, 8192, 50257):
        for train in (False, True):
            yield build(
                cross_entropy._loss_and_gradient,
                f"cross-entropy{' and gradient' * train} bf16 V{V}",
                cross_entropy._config(V, train) | {"GRADIENT": train},
                gate=V == 50257 and train,
                odd=("M", "V", "ignore_index"),
            )
