"""The shipped configurations of our Triton kernels, for bench.aot."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

TUNED = (80, 90, 100)  # targets with their own tiles, for which every configuration is compiled
CONSUMER = (86, 89, 120)  # targets for which only the most used are
MMA = {90: "HGMMA", 100: "UTC"}  # tensor-core instructions that attention must use by target, on others HMMA
# Types of arguments that are not constexpr, by name; all others are pointers to numbers of the activations' dtype.
TYPES = dict.fromkeys(("M", "V", "C", "F", "T", "H", "stride", "ignore_index"), "i32")
TYPES |= dict.fromkeys(("eps", "scale", "z_loss"), "fp32") | {"Targets": "*i64"}
TYPES |= dict.fromkeys(("W", "B", "Stats", "Partial", "Table", "R", "Loss"), "*fp32")
TYPES |= dict.fromkeys(("lse", "delta", "lse_m", "delta_m", "table", "r"), "*fp32")


@dataclass(frozen=True)
class Build:
    """A configuration of a kernel on a target. As in a launch, pointers count as 16-byte aligned and `i32` arguments as
    multiples of 16, except those in `odd` (such as a number of heads)."""

    capability: int
    kernel: object  # a @triton.jit function
    label: str
    config: dict  # num_warps, num_stages if not 3, and the constexprs by argument, None for an absent tensor
    gate: bool = False  # one of the most used
    odd: tuple[str, ...] = ()
    dtype: str = "bf16"
    wanted_mma: str = ""

    @property
    def name(self) -> str:
        return f"sm_{self.capability} {self.kernel.fn.__module__.removeprefix('kernels.')} {self.label}"

    def type_of(self, argument: str) -> str:
        """As `triton.compile` names it."""
        if argument in self.config:
            return "constexpr"
        kind = TYPES.get(argument, f"*{self.dtype}")
        if not self.config.get("TMA") or argument[-2:] not in ("_m", "_n"):
            return kind
        rows = self.config[f"BLOCK_{argument[-1].upper()}"]
        block = f"1, {rows}" if argument in ("lse_m", "delta_m") else f"1, 1, {rows}, {self.config['BLOCK_D']}"
        return f"tensordesc<{kind[1:]}[{block}]>"


@functools.cache
def builds() -> list[Build]:
    """All shipped configurations, on the targets that they are compiled for."""
    found = [build for capability in (*TUNED, *CONSUMER) for build in builds_for(capability)]
    return [build for build in found if build.gate or build.capability in TUNED]


def builds_for(capability: int) -> Iterator[Build]:
    """All configurations for one target."""
    import torch

    from kernels import activation, attention, cross_entropy, norms, rotary

    build = functools.partial(Build, capability)

    # Attention: every row of TILES, head sizes that need padding, with and without positions.
    cases = [("bf16", 1024, D, " rotary") for D in (128, 64, 32, 16, 96, 24, 90, 50, 26, 10)]
    cases += [("bf16", 1024, D, also) for D in (128, 64) for also in ("", " rotary qk-norm")]
    cases += [(dtype, T, D, " rotary") for dtype, T in (("bf16", 64), ("fp32", 1024)) for D in (128, 64)]
    target, dtypes = attention.TARGETS.get(capability // 10, "sm_80"), {"bf16": torch.bfloat16, "fp32": torch.float32}
    for dtype, T, D, also in cases:
        gate = dtype == "bf16" and T > 64 and D in (64, 128) and also == " rotary"
        wanted = MMA.get(capability, "HMMA") if dtype == "bf16" else ""
        absent = dict.fromkeys(["r"] * ("qk-norm" not in also) + ["table"] * (not also))
        # The forward kernel does not depend on the norm.
        for kernel in attention.KERNELS[1:] if "qk-norm" in also else attention.KERNELS:
            config = attention.configure(kernel, target, dtypes[dtype], T, D) | {"ROTATED": bool(also)} | absent
            label = f"{kernel.__name__[1:]} {dtype} D{D} T{'<=' if T == 64 else '>'}64{also}"
            yield build(kernel, label, config, gate, ("T", "H"), dtype, wanted)

    # Norms: with the residual, weights in float32.
    for name, centred in (("add_rms_norm", False), ("add_layer_norm", True)):
        options = {"CENTRED": centred, "ADD": True, "BIAS": centred} | ({} if centred else {"B": None})
        for C in (384, 768, 1024, 2048, 4096, 8192):
            forward, backward = options | norms._forward_config(C), options | norms._backward_config(C)
            yield build(norms._forward, f"{name} forward bf16 C{C}", forward, C == 768 and not centred)
            yield build(norms._backward, f"{name} backward bf16 C{C}", backward, C == 768 and not centred)

    for D, norm in ((64, False), (64, True), (128, False), (128, True)):
        config = rotary._config(12, D) | {"ROTATE": True, "NORM": norm} | ({} if norm else {"R": None})
        label = f"rotary{' and qk-norm' * norm} for attention bf16 D{D}"
        yield build(rotary._rotate, label, config, D == 64, ("H",))

    for kind in activation.KINDS:
        config = activation._config(2048) | {"KIND": kind}
        yield build(activation._forward, f"{kind} forward bf16", config)
        yield build(activation._backward, f"{kind} backward bf16", config)

    for V, train in ((V, train) for V in (256, 8192, 50257) for train in (False, True)):
        label, config = f"cross-entropy{' and gradient' * train} bf16 V{V}", cross_entropy._config(V, train)
        gate, odd = V == 50257 and train, ("M", "V", "ignore_index")
        yield build(cross_entropy._loss_and_gradient, label, config | {"GRADIENT": train}, gate, odd)
