"""The faster backend of an operation, measured once for each shape class, dtype and device, and remembered.

Ranks measure each for themselves and may choose differently where two backends are about equally fast. Their values
then agree within the dtype's tolerance, not to the last bit, as they do between two kinds of GPU. Who needs equal bits
names the backend.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.measured import MeasuredCache, default_cache, may_measure, seconds

_CHUNK = 2**22  # numbers that are compared at once: a large result's differences would double the memory in use

# A candidate whose result is further from the reference's than this, relative to the reference's largest value, is
# wrong and not merely rounded. Loose: exact comparisons are the tests' work.
_LIMIT = {torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 1e-1}


def fastest(
    op: str,
    shape_class: tuple[object, ...],
    x: Tensor,
    run: Callable[[str], Sequence[Tensor]],
    candidates: Sequence[str],
    cache: MeasuredCache | None = None,
) -> str:
    """The name of the fastest candidate whose result agrees with the first one's.

    Args:
        op, shape_class: under which the answer is kept, with x's dtype.
        x: an input; on a CPU nothing is measured and the first candidate is the answer.
        run: runs the operation on the backend of that name, forward and backward, and returns all results.
        candidates: names; the first is the reference.
        cache: where answers are kept; None for the user's own.
    """
    if not x.is_cuda:
        return candidates[0]
    return measure(op, (*shape_class, x.dtype), x.device, run, candidates, cache or default_cache())


def measure(
    op: str,
    key: tuple[object, ...],
    device: torch.device,
    run: Callable[[str], Sequence[Tensor]],
    candidates: Sequence[str],
    cache: MeasuredCache,
) -> str:
    """`fastest` on any device: the kept answer, or a new measurement. While a CUDA graph is captured nothing can be
    measured: without a kept answer the first candidate is taken and nothing is kept.

    A candidate that raises is left out with a warning, for whatever reason: no C compiler for Triton's launcher, no
    headers of Python, no libcuda, a kernel that does not compile. Where memory runs out the reference is taken and
    nothing is kept, since the next time there may be room. What the reference raises, and a device that is lost, are
    the caller's.
    """
    kept = cache.get(device, op, key)
    if kept in candidates:
        return str(kept)
    if not may_measure(device):
        return candidates[0]
    try:
        expected = run(candidates[0])
        times = {candidates[0]: seconds(lambda: run(candidates[0]), device)}
        for name in candidates[1:]:
            fault = _fault(name, run, expected, device, times)
            if fault:
                warnings.warn(f"{op} {key}: backend {name} is not used on {device}: {fault}", stacklevel=2)
    except torch.OutOfMemoryError as error:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"{op} {key}: there is no memory on {device} to measure backends, so {candidates[0]} is used: "
            f"{str(error)[:200]}",
            stacklevel=2,
        )
        return candidates[0]
    chosen = min(times, key=lambda name: times[name])
    cache.put(device, op, key, chosen)
    return chosen


def both_ways(call: Callable[..., Tensor], *inputs: Tensor | None) -> list[Tensor]:
    """Value and gradients of a call on detached inputs: what `run` returns for a differentiable operation."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else None for x in inputs]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    with torch.enable_grad():
        out = call(*leaves)
        grads = torch.autograd.grad(out, wanted, torch.ones_like(out))
    return [out.detach(), *grads]


def _fault(
    name: str,
    run: Callable[[str], Sequence[Tensor]],
    expected: Sequence[Tensor],
    device: torch.device,
    times: dict[str, float],
) -> str:
    """Measures a candidate into `times`, or says why it cannot be used here: it raises, or its result is wrong."""
    try:
        results = run(name)
        for result, exact in zip(results, expected, strict=True):
            if fault := _difference(result, exact):
                return fault
        times[name] = seconds(lambda: run(name), device)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # the first is for whoever measures; after the second the device's context is lost
    except Exception as error:  # noqa: BLE001 (a compiler, a driver or a library that is missing raises anything)
        return f"it cannot run ({type(error).__name__}: {str(error)[:200]})"
    return ""


def _difference(result: Tensor, exact: Tensor) -> str:
    """How far a result is from the reference's, where that is too far; empty elsewhere."""
    if not exact.numel():
        return ""
    limit = _LIMIT.get(exact.dtype, 0.0)
    pairs = zip(result.reshape(-1).split(_CHUNK), exact.reshape(-1).split(_CHUNK), strict=True)
    # As a maximum over chunks of differences in fp32; NaN stays NaN, and is never within the limit.
    distance = torch.stack([(one.float() - other.float()).abs().max() for one, other in pairs]).max().item()
    scale = exact.abs().max().item()
    if distance <= limit * scale + 1e-12:
        return ""
    return f"a result differs from the reference by {distance:.3g} where the largest is {scale:.3g}"
