"""Bits per byte and the comparison with compressors, given only where they are true, and else why they are absent."""

from typing import Any

from data.dataset import Dataset
from data.mixture import MixedDataset
from launch.evaluate import Evaluation

NAMES = ("bits_per_byte", "gzip_bits_per_byte", "xz_bits_per_byte")


def why_no_bits(dataset: Dataset | MixedDataset) -> str:
    """Why a dataset's held-out loss says nothing about bits per byte, "" where it does.

    A tokenizer that drops text or writes one token for many words leaves little to predict: its loss over the bytes of
    the text would be below what any compressor can reach, and would not be a compression of that text.
    """
    if dataset.lossless:
        return ""
    return (
        f"the tokenizer {dataset.manifest.tokenizer} does not give back every byte of the text (the dataset's manifest "
        'says "lossless": false), so its loss is not one of the whole text; compare nats a token between runs of this '
        "tokenizer only"
    )


def byte_figures(result: Evaluation, why_not: str) -> dict[str, Any]:
    """The figures under NAMES; each None, with the reason under `bits_per_byte_absent`, where there is one.

    Args:
        why_not: of `why_no_bits`.
    """
    if not result.raw_bytes:
        why_not = why_not or "the held-out documents hold no text"
    if why_not:
        return {**dict.fromkeys(NAMES), "bits_per_byte_absent": why_not}
    sizes = result.compressed
    return dict(zip(NAMES, (result.bits_per_byte, sizes.gzip_bits_per_byte, sizes.xz_bits_per_byte), strict=True))
