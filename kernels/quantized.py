"""Weights in 8 or 4 bits with a scale for each group of inputs, and the product of rows with them."""

# M rows, K inputs, N outputs, G groups of a row of weights

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Bits = Literal[8, 4]
# Parts of a group's range that are tried as the range of its codes; the one with the least squared error is taken.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
_TORCH_GROUPS = (32, 64, 128, 256)  # of torch's CPU product for 4 bits


class Quantized(NamedTuple):
    """A matrix (N, K): weight[n, k] = code * scale + offset of the group that k is in.

    codes: 8 bits: int8 (N, K), -127 .. 127. 4 bits: uint8 (N, K/2), two codes + 8 a byte: the even input's in the low
        half, or in the order of torch's operator where `torch_op`.
    scales: bfloat16 (N, G).
    offsets: bfloat16 (N, G), or None where groups are symmetric about 0.
    tables: bfloat16 (G, N, 2), scales and offsets for torch's 4-bit operator, which needs both; else None.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    tables: Tensor | None
    bits: Bits
    torch_op: bool

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = (self.codes, self.scales, self.offsets, self.tables)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def problems(bits: int, group_size: int | None) -> list[str]:
    """Every violated rule of a quantisation."""
    found = []
    if bits not in (8, 4):
        found.append(f"quantisation to {bits} bits is not known; use 8 or 4")
    if group_size is not None and (group_size < 2 or group_size % 2):
        found.append(f"group size {group_size} must be an even number of inputs, at least 2; for example 32")
    return found


def quantize_matrix(weight: Tensor, bits: Bits, group_size: int | None, zero_points: bool = False) -> Quantized:
    """Round a matrix to codes.

    Scales and offsets are rounded to bfloat16 first and the codes chosen for the rounded ones.

    Args:
        weight: (N, K), any float dtype.
        bits: 8 or 4.
        group_size: consecutive inputs that share a scale; None, or where it does not divide K, a whole row.
        zero_points: give each group an offset too, so that its codes span its values and not a range about 0.

    Raises:
        ValueError: `problems`, or an odd K with 4 bits.
    """
    n_out, n_in = weight.shape
    found = problems(bits, group_size)
    if bits == 4 and n_in % 2:
        found.append(f"a weight of {n_in} inputs cannot be stored two to a byte; use 8 bits")
    if found:
        raise ValueError("; ".join(found))
    size = n_in if group_size is None or n_in % group_size else group_size
    groups = weight.detach().float().reshape(n_out, -1, size)  # (N, G, size)
    top = 127 if bits == 8 else 7
    bottom = -top - 1 if zero_points else -top
    best_error = torch.full(groups.shape[:2], float("inf"), device=weight.device)
    best_scale, best_offset = torch.zeros_like(best_error), torch.zeros_like(best_error)
    low, high = groups.amin(-1), groups.amax(-1)
    for part in _SHRINK if bits == 4 else (1.0,):
        if zero_points:
            scale = ((high - low) * part / (top - bottom)).bfloat16().float()
            offset = ((high + low) / 2 + scale / 2).bfloat16().float()  # codes reach one step further down than up
        else:
            scale = (torch.maximum(high, -low) * part / top).bfloat16().float()
            offset = torch.zeros_like(scale)
        codes = _codes(groups, scale, offset, bottom, top)
        error = (codes * scale.unsqueeze(-1) + offset.unsqueeze(-1) - groups).square().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_offset = torch.where(better, scale, best_scale), torch.where(better, offset, best_offset)
    codes = _codes(groups, best_scale, best_offset, bottom, top).view(n_out, n_in)
    offsets = best_offset.bfloat16() if zero_points else None
    takes = _torch_takes(weight, size, bits, zero_points)
    tables = None
    if bits == 8:
        stored = codes.to(torch.int8)
    elif takes:
        stored = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).to(torch.int32), 1)
        tables = torch.stack([best_scale.t(), best_offset.t()], -1).bfloat16().contiguous()
    else:
        pairs = (codes + 8).to(torch.uint8).view(n_out, -1, 2)
        stored = pairs[..., 0] | pairs[..., 1] << 4
    return Quantized(stored, best_scale.bfloat16(), offsets, tables, bits, takes)


def _codes(groups: Tensor, scale: Tensor, offset: Tensor, bottom: int, top: int) -> Tensor:
    """Nearest codes (N, G, size), as fp32; 0 in a group without extent."""
    inverse = torch.where(scale > 0, scale.reciprocal(), 0.0)
    return ((groups - offset.unsqueeze(-1)) * inverse.unsqueeze(-1)).round_().clamp_(bottom, top)


def _torch_takes(weight: Tensor, size: int, bits: int, zero_points: bool) -> bool:
    """Whether torch's own CPU operator multiplies by this; it does not check every shape that it cannot take."""
    n_out, n_in = weight.shape
    if weight.device.type != "cpu" or n_out % 16 or n_in % 32:
        return False
    return size in _TORCH_GROUPS if bits == 4 else size == n_in and not zero_points


def dequantize(matrix: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, K): the values that the codes stand for; slow for a matrix in the order of torch's operator."""
    if matrix.bits == 4 and matrix.torch_op:
        n_in = matrix.codes.shape[1] * 2
        ones = torch.stack([torch.ones_like(matrix.scales), torch.zeros_like(matrix.scales)], -1)
        unit = ones.transpose(0, 1).contiguous()  # the product with the identity, scale 1 and offset 0: the codes
        eye = torch.eye(n_in, dtype=torch.bfloat16)
        codes = torch.ops.aten._weight_int4pack_mm_for_cpu(eye, matrix.codes, n_in // unit.shape[0], unit).t()
    elif matrix.bits == 4:
        codes = torch.stack([matrix.codes & 15, matrix.codes >> 4], -1).flatten(1).to(torch.int8) - 8
    else:
        codes = matrix.codes
    scales = matrix.scales.to(dtype)
    groups = codes.to(dtype).view(*scales.shape, -1) * scales.unsqueeze(-1)
    if matrix.offsets is not None:
        groups = groups + matrix.offsets.to(dtype).unsqueeze(-1)
    return groups.flatten(1)


def quantized_linear(x: Tensor, matrix: Quantized) -> Tensor:
    """Rows times the transpose of a quantised matrix.

    On a CPU, one thread of an AVX512 core, 1 row times (1024, 768): fp32 44 us, torch's operator with 8 bits 21 us,
    with 4 bits 23 us; both round the rows and the result to bfloat16, and take 550 and 1,220 us with fp32 rows. So
    rows are cast. Where the operator does not take the matrix it is dequantised for the product.

    Args:
        x: (M, K), any float dtype.

    Returns:
        (M, N) in x's dtype.
    """
    if not matrix.torch_op:
        return F.linear(x, dequantize(matrix, x.dtype))
    rows = x.to(torch.bfloat16)
    if matrix.bits == 8:
        return torch._weight_int8pack_mm(rows, matrix.codes, matrix.scales.view(-1)).to(x.dtype)
    group_size = matrix.codes.shape[1] * 2 // matrix.scales.shape[1]
    return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, matrix.codes, group_size, matrix.tables).to(x.dtype)
