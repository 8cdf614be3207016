"""The table of peaks: the entry that a device's name means."""

import pytest
import torch

from launch.peak import _GPUS, known_gpu, peak_flops


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA H800", "H800"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 D", "RTX 4090 D"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("NVIDIA GeForce RTX 4070", "RTX 4070"),
        ("NVIDIA GeForce RTX 5070 Ti", "RTX 5070 Ti"),
        ("NVIDIA GeForce RTX 2080 Ti", None),
        ("NVIDIA GeForce RTX 2070 with Max-Q Design", None),
        ("Tesla T4", None),
    ],
)
def test_the_longest_name_counts(name: str, known: str | None) -> None:
    assert known_gpu(name) == known


def test_bf16_is_never_slower_than_fp32_and_geforce_has_twice() -> None:
    for name, (bf16, fp32) in _GPUS.items():
        if fp32 is not None:
            assert bf16 > fp32
            if name.startswith("RTX ") and "A6000" not in name:
                assert bf16 == pytest.approx(2 * fp32, rel=0.01), name


def test_a_known_gpu_has_its_data_sheets_peak_and_an_unknown_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr("launch.peak._measure", lambda device, dtype, size: 1.0)
    for name, precision, expected in (
        ("NVIDIA H100 NVL", "bf16", (835.5e12, "data sheet of H100 NVL")),
        ("NVIDIA H100 NVL", "fp32", (60e12, "data sheet of H100 NVL")),
        ("NVIDIA GB300", "fp32", (1.0, "measured: product of 4096 x 4096 in fp32")),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", (1.0, "measured: product of 4096 x 4096 in bf16")),
    ):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device, name=name: name)
        assert peak_flops(cuda, precision) == expected
