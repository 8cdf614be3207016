"""The arithmetic peak that model FLOPs utilisation is measured against."""

import time

import torch

# Dense peaks in FLOP/s: bf16 on tensor cores with sums in fp32, without sparsity, and fp32 without TF32. From NVIDIA's
# data sheets; for GeForce from the architecture's white paper (Ampere, Ada, Blackwell: bf16 with sums in fp32 is twice
# fp32). None: the data sheet does not say. The longest name that a device's name contains counts.
_GPUS: dict[str, tuple[float, float | None]] = {
    "GB300": (2500e12, None), "B300": (2250e12, None), "GB200": (2500e12, 80e12), "B200": (2250e12, 75e12),
    "GH200": (989.5e12, 67e12), "H200 NVL": (835.5e12, 60e12), "H200": (989.5e12, 67e12),
    "H100 NVL": (835.5e12, 60e12), "H100 PCIe": (756e12, 51e12), "H100": (989.5e12, 67e12), "H800": (989.5e12, 67e12),
    "H20": (148e12, 44e12),
    "A100": (312e12, 19.5e12), "A800": (312e12, 19.5e12), "A30": (165e12, 10.3e12), "A40": (149.7e12, 37.4e12),
    "A10": (125e12, 31.2e12), "RTX A6000": (154.8e12, 38.7e12),
    "L40S": (362e12, 91.6e12), "L40": (181e12, 90.5e12), "L4": (121e12, 30.3e12),
    "RTX 5090": (209.6e12, 104.8e12), "RTX 5080": (112.6e12, 56.3e12), "RTX 5070 Ti": (87.8e12, 43.9e12),
    "RTX 5070": (61.8e12, 30.9e12),
    "RTX 4090": (165.2e12, 82.6e12), "RTX 4090 D": (147.2e12, 73.6e12), "RTX 4080": (97.4e12, 48.7e12),
    "RTX 4080 SUPER": (104.4e12, 52.2e12), "RTX 4070 Ti SUPER": (88.2e12, 44.1e12), "RTX 4070 Ti": (80.2e12, 40.1e12),
    "RTX 4070 SUPER": (71e12, 35.5e12), "RTX 4070": (58.2e12, 29.1e12), "RTX 4060 Ti": (44.2e12, 22.1e12),
    "RTX 4060": (30.2e12, 15.1e12),
    "RTX 3090 Ti": (80e12, 40e12), "RTX 3090": (71e12, 35.6e12), "RTX 3080 Ti": (68.2e12, 34.1e12),
    "RTX 3080": (59.6e12, 29.8e12), "RTX 3070": (40.6e12, 20.3e12), "RTX 3060": (25.4e12, 12.7e12),
}  # fmt: skip
_OTHERS = ("Laptop", "Max-Q", "A10G", "GH100")  # cards of a known name with clocks or units of their own


def known_gpu(name: str) -> str | None:
    """The entry of the table that a device's name means; None where there is none."""
    if any(other in name for other in _OTHERS):
        return None
    words = f"{name.replace('-', ' ')} "
    matching = [known for known in _GPUS if f"{known} " in words]
    return max(matching, key=len, default=None)


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
        known = known_gpu(torch.cuda.get_device_name(device))
        bf16, fp32 = _GPUS[known] if known is not None else (None, None)
        peak = bf16 if precision == "bf16" else fp32
        if peak is not None:
            return peak, f"data sheet of {known}"
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
