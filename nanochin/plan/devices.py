"""Peak FLOP/s and memory bandwidth of known accelerators."""

import re
from dataclasses import dataclass

BYTES = {"float16": 2, "bfloat16": 2, "tf32": 4, "float32": 4}


@dataclass(frozen=True)
class Device:
    """Published peaks: dense (no 2:4 sparsity) TFLOP/s per dtype with float32 accumulation, and memory GB/s."""

    names: str  # regular expression that matches all of torch.cuda.get_device_name() without the vendor prefix
    float16: float | None
    bfloat16: float | None
    tf32: float | None  # float32 data, TF32 tensor cores
    float32: float  # without tensor cores
    bandwidth: float


# Full names only: a laptop chip, a GPU slice (MIG) or a China edition shares part of its name with a faster device.
# GeForce cards run at half rate with float32 accumulation, as training needs; that rate is listed.
# Sources: NVIDIA's data sheets and architecture white papers (Volta to Blackwell), AMD's CDNA 2-3 data sheets.
DEVICES = {
    #                        names                             fp16    bf16    tf32   fp32   GB/s
    "P100 PCIe": Device(r"P100-PCIE-16GB", 18.7, None, None, 9.3, 732),
    "V100 PCIe": Device(r"V100-PCIE-(16|32)GB", 112.0, None, None, 14.0, 900),
    "V100 SXM": Device(r"V100-SXM2-(16|32)GB", 125.0, None, None, 15.7, 900),
    "T4": Device(r"T4", 65.0, None, None, 8.1, 320),
    "A100 SXM 40GB": Device(r"A100-SXM4-40GB", 312.0, 312.0, 156.0, 19.5, 1555),
    "A100 SXM 80GB": Device(r"A[18]00-SXM4-80GB", 312.0, 312.0, 156.0, 19.5, 2039),
    "A100 PCIe 40GB": Device(r"A100-PCIE-40GB", 312.0, 312.0, 156.0, 19.5, 1555),
    "A100 PCIe 80GB": Device(r"A[18]00 80GB PCIe", 312.0, 312.0, 156.0, 19.5, 1935),
    "A10": Device(r"A10", 125.0, 125.0, 62.5, 31.2, 600),
    "A10G": Device(r"A10G", 70.0, 70.0, 35.0, 35.0, 600),
    "A30": Device(r"A30", 165.0, 165.0, 82.0, 10.3, 933),
    "A40": Device(r"A40", 149.7, 149.7, 74.8, 37.4, 696),
    "RTX A6000": Device(r"RTX A6000", 154.8, 154.8, 77.4, 38.7, 768),
    "RTX 6000 Ada": Device(r"RTX 6000 Ada Generation", 364.2, 364.2, 182.1, 91.1, 960),
    "L4": Device(r"L4", 121.0, 121.0, 60.0, 30.3, 300),
    "L40": Device(r"L40", 181.0, 181.0, 90.5, 90.5, 864),
    "L40S": Device(r"L40S", 362.0, 362.0, 183.0, 91.6, 864),
    "H100 SXM": Device(r"H100 80GB HBM3|H800", 989.4, 989.4, 494.7, 66.9, 3352),
    "H100 PCIe": Device(r"H[18]00 PCIe", 756.0, 756.0, 378.0, 51.2, 2039),
    "H100 NVL": Device(r"H100 NVL", 835.5, 835.5, 417.5, 60.0, 3938),
    "H200": Device(r"H200", 989.4, 989.4, 494.7, 66.9, 4800),
    "H200 NVL": Device(r"H200 NVL", 835.5, 835.5, 417.5, 60.0, 4800),
    "H20": Device(r"H20", 148.0, 148.0, 74.0, 44.0, 4000),
    "GH200 96GB": Device(r"GH200 (120GB|480GB)", 989.4, 989.4, 494.7, 66.9, 4000),
    "B200": Device(r"B200", 2250.0, 2250.0, 1125.0, 80.0, 8000),
    "GB200": Device(r"GB200", 2500.0, 2500.0, 1250.0, 80.0, 8000),
    "RTX 3080": Device(r"RTX 3080", 59.5, 59.5, 29.8, 29.8, 760),
    "RTX 3090": Device(r"RTX 3090", 71.0, 71.0, 35.6, 35.6, 936),
    "RTX 3090 Ti": Device(r"RTX 3090 Ti", 80.0, 80.0, 40.0, 40.0, 1008),
    "RTX 4080": Device(r"RTX 4080", 97.5, 97.5, 48.7, 48.7, 717),
    "RTX 4090": Device(r"RTX 4090", 165.2, 165.2, 82.6, 82.6, 1008),
    "RTX 5080": Device(r"RTX 5080", 112.6, 112.6, 56.3, 56.3, 960),
    "RTX 5090": Device(r"RTX 5090", 209.5, 209.5, 104.8, 104.8, 1792),
    "MI210": Device(r"MI210", 181.0, 181.0, None, 22.6, 1638),
    "MI250X (one die)": Device(r"MI250X( ?/ ?MI250)?", 191.5, 191.5, None, 23.9, 1638),
    "MI300X": Device(r"MI300X( OAM| VF)?", 1307.4, 1307.4, 653.7, 163.4, 5300),
    "MI325X": Device(r"MI325X( OAM)?", 1307.4, 1307.4, 653.7, 163.4, 6000),
}


def find_device(name: str) -> Device | None:
    """The device by torch's name, such as "NVIDIA H100 80GB HBM3", or by the table's: "H100 SXM". None if unknown."""
    bare = re.sub(r"^(NVIDIA |AMD Instinct )?(GeForce |Tesla )?", "", name.strip())
    by_torch = (device for device in DEVICES.values() if re.fullmatch(device.names, bare))
    return DEVICES.get(name) or next(by_torch, None)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak FLOP/s of a known accelerator for float16, bfloat16, tf32 or float32. None for an unknown device or a
    dtype that its matrix units lack: then there is no MFU rather than a guess."""
    device = find_device(device_name)
    peak = getattr(device, dtype) if device else None
    return None if peak is None else peak * 1e12
