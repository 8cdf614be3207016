"""Compiles every Triton kernel for a Hopper GPU, on any machine: types, layouts, shared memory, registers."""

import importlib
import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton has no package for this operating system")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process, not compiled"
)

SHARED_LIMIT = 227 * 1024  # bytes that a program may use on an H100 or H200
# A few spilled values cost nothing beside a product; hundreds mean that a tile is too large for its registers.
SPILL_LIMIT = 256

# A pointer's type by the parameter's name; every other pointer is to the values' dtype.
POINTERS = {
    "*i64": ("index_ptr", "left_index_ptr", "right_index_ptr", "inverse_ptr", "order_ptr", "targets_ptr", "ids_ptr"),
    "*i32": ("table_ptr", "count_ptr"),
    "*fp32": (
        "scale_ptr", "dots_ptr", "weights_ptr", "grad_weights_ptr", "log_sums_ptr", "picked_ptr", "partial_ptr",
        "cos_ptr", "sin_ptr", "scales_ptr",
    ),
}  # fmt: skip
GROUPED, EXPERTS, PERMUTE, ROUTER = (
    f"kernels.{name}_triton" for name in ("grouped_mm", "experts", "permute", "router_topk")
)
TILE = {"ROWS": 128, "WIDE": 256, "INNER": 64, "GROUP": 8, "GATHER": True, "SCALE": True, "WHOLE": False}
PAIR = TILE | {"WIDE": 128, "KEEP": True, "ACTIVE": True}
OUTER = {"OUT": 128, "IN": 256, "ROWS": 64, "GROUP": 8, "GATHER_LEFT": True, "GATHER_RIGHT": True, "WHOLE": False}
CHOICE = {"SIGMOID": True, "NORMALISE": True, "TOP_K": 8, "K_BLOCK": 8, "ROWS": 8}
FP32 = {"logits_ptr": "*fp32", "bias_ptr": "*fp32", "scores_ptr": "*fp32", "out_ptr": "*fp32"}
CASES = [
    (GROUPED, "tiles_kernel", {"ROWS": 128, "EXPERTS": 256, "bounds_ptr": "*i32"}, 4, 3),
    (GROUPED, "rows_kernel", TILE | {"inner_stride": 1, "bounds_ptr": "*i32"}, 8, 3),
    (GROUPED, "rows_kernel", TILE | {"wide_stride": 1, "bounds_ptr": "*i32"}, 8, 3),
    (GROUPED, "weights_kernel", OUTER | {"bounds_ptr": "*i32"}, 8, 5),
    (EXPERTS, "gate_up_kernel", PAIR | {"bounds_ptr": "*i32"}, 8, 3),
    (EXPERTS, "hidden_grad_kernel", TILE | {"WIDE": 128, "bounds_ptr": "*i32"}, 8, 3),
    (PERMUTE, "spread_kernel", {"TOP_K": 8, "BLOCK": 4096}, 4, 3),
    (PERMUTE, "gather_sum_kernel", {"TOP_K": 8, "BLOCK": 4096, "WEIGHTED": True}, 4, 3),
    (PERMUTE, "unpermute_backward_kernel", {"TOP_K": 8, "BLOCK": 4096, "DOTS": True}, 4, 3),
    (PERMUTE, "sum_rows_kernel", {"BLOCK": 4096, "bounds_ptr": "*i64"}, 4, 3),
    (
        ROUTER, "forward_kernel",
        CHOICE | FP32 | {
            "BIAS": True, "LIMITED": True, "KEPT": 4, "BEST": 2, "GROUPS": 8, "PER": 32, "scaling": "fp32",
            "counts_ptr": "*i64", "changed_ptr": "*i64",
        },
        4, 3,
    ),
    (
        ROUTER, "backward_kernel",
        CHOICE | FP32 | {"WIDE": 256, "SIGMOID": False, "scaling": "fp32", "grad_scores_ptr": "*fp32"}, 4, 3,
    ),
    ("kernels.rms_norm_triton", "forward_kernel", {"BLOCK": 8192, "eps": "fp32", "weight_ptr": "*bf16"}, 8, 3),
    ("kernels.rms_norm_triton", "backward_kernel", {"BLOCK": 8192, "weight_ptr": "*bf16"}, 8, 3),
    ("kernels.rope_triton", "turn_kernel", {"SIGN": -1.0, "ROWS": 32, "HALF": 32}, 4, 3),
    ("kernels.swiglu_triton", "forward_kernel", {"BLOCK": 1024}, 4, 3),
    ("kernels.swiglu_triton", "backward_kernel", {"BLOCK": 1024}, 4, 3),
    ("kernels.cross_entropy_triton", "scan_kernel", {"BLOCK": 4096}, 8, 3),
    ("kernels.cross_entropy_triton", "error_kernel", {"BLOCK": 4096, "grad_ptr": "*fp32"}, 8, 3),
    ("kernels.fp8_triton", "quantize_kernel", {"LIMIT": 448.0, "BLOCK": 8192, "values_ptr": "*fp8e4nv"}, 4, 3),
    ("kernels.fp8_triton", "dequantize_kernel", {"BLOCK": 8192, "values_ptr": "*fp8e4nv"}, 4, 3),
]  # fmt: skip


def compile_for_hopper(kernel, given, warps, stages):
    """Pointers and integers are taken to be multiples of 16, as they are in a model."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = given.get(name)
        if value is None:
            by_name = (kind for kind, names in POINTERS.items() if name in names)
            value = next(by_name, "*bf16") if name.endswith("_ptr") else "i32"
        if isinstance(value, str):
            signature[name] = value
            if value != "fp32":
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(place,)] = value
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def spilled_bytes(ptx):
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    done = subprocess.run(
        [assembler, "-v", "--gpu-name=sm_90a", "/dev/stdin", "-o", "/dev/null"],
        input=ptx, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return sum(int(found) for found in re.findall(r"(\d+) bytes spill", done.stderr))


@pytest.mark.parametrize(
    ("module", "name", "given", "warps", "stages"), CASES,
    ids=[f"{module.removeprefix('kernels.').removesuffix('_triton')}.{name}" for module, name, *_ in CASES],
)  # fmt: skip
def test_kernel_compiles_for_hopper(module, name, given, warps, stages):
    kernel = getattr(importlib.import_module(module), name)
    built = compile_for_hopper(kernel, given, warps, stages)
    assert built.metadata.shared <= SHARED_LIMIT
    assert spilled_bytes(built.asm["ptx"]) <= SPILL_LIMIT
    if "INNER" in given or "OUT" in given:  # products in half precision run on the tensor cores, fed without registers
        assert "wgmma.mma_async" in built.asm["ptx"]
        assert "cp.async.cg.shared.global" in built.asm["ptx"]


def test_every_kernel_is_compiled_here():
    listed = {(module, name) for module, name, *_ in CASES}
    for path in sorted(Path(__file__).parents[2].joinpath("kernels").glob("*_triton.py")):
        module = f"kernels.{path.stem}"
        for name in re.findall(r"@triton\.jit\ndef (\w+_kernel)\(", path.read_text(encoding="utf-8")):
            assert (module, name) in listed
