"""The arithmetic peak that model FLOPs utilisation is measured against."""

import time

import torch

# Dense tensor-core peaks in FLOP/s from NVIDIA's data sheets, without sparsity: bf16 and fp32 (TF32 off).
_GPUS = {
    "H200": (989.5e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989.5e12, 67e12),
    "B200": (2250e12, 80e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """The peak of one rank's device.

    Args:
        device: of this rank.
        precision: `fp32` or `bf16`.

    Returns:
        FLOP/s, and where the figure is from: the data sheet of a known GPU, or a product measured now, with the threads
        that this process has. A measured peak is what this machine does, not what it could do.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (bf16, fp32) in _GPUS.items():
            if known in name:
                return (bf16 if precision == "bf16" else fp32), f"data sheet of {known}"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 4096 if device.type == "cuda" else 768
    return _measure(device, dtype, size), f"measured: product of {size} x {size} in {precision}"


def _measure(device: torch.device, dtype: torch.dtype, size: int) -> float:
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    deadline = time.perf_counter() + 0.4
    while time.perf_counter() < deadline:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
