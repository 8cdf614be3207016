"""What general compressors make of the held-out text: the yardstick beside a language model's bits per byte."""

import gzip
import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class CompressedSizes:
    """Sizes in bytes of one byte string, plain and compressed; ``xz_bytes`` is None where this Python has no lzma.

    Only the compressed stream is counted, without a stored file name, as the command line tools count it apart from the
    name that ``gzip FILE`` puts into its header.
    """

    raw_bytes: int
    gzip_bytes: int
    xz_bytes: int | None

    @property
    def gzip_bits_per_byte(self) -> float:
        """Compressed bits per byte of text under ``gzip -9``; NaN for empty input."""
        return _bits_per_byte(self.gzip_bytes, self.raw_bytes)

    @property
    def xz_bits_per_byte(self) -> float | None:
        """Compressed bits per byte of text under ``xz -9``; NaN for empty input, None without lzma."""
        return None if self.xz_bytes is None else _bits_per_byte(self.xz_bytes, self.raw_bytes)


def _bits_per_byte(compressed_bytes: int, raw_bytes: int) -> float:
    return 8.0 * compressed_bytes / raw_bytes if raw_bytes else math.nan


def compressed_sizes(documents: Iterable[bytes]) -> CompressedSizes:
    """Sizes under ``gzip -9`` and ``xz -9`` of the documents, joined end to end in the given order.

    Joining favours the compressors: they may refer back over document borders (gzip 32 KiB, xz 64 MiB), which a
    language model with intra-document attention may not. Each document alone would cost them a header a document.
    """
    text = b"".join(documents)
    return CompressedSizes(len(text), len(gzip.compress(text, compresslevel=9, mtime=0)), _xz_bytes(text))


def _xz_bytes(text: bytes) -> int | None:
    try:
        import lzma  # a Python built without liblzma has no such module
    except ImportError:
        return None
    return len(lzma.compress(text, preset=9))


def bits_per_byte(total_nats: float, text_bytes: int) -> float:
    """A model's summed cross-entropy over a text as bits per byte, the unit that compressors are compared in.

    Args:
        total_nats: cross-entropy summed (not averaged) over every token that stands for these bytes, in nats.
        text_bytes: how many bytes of text those tokens stand for.
    """
    return total_nats / math.log(2.0) / text_bytes if text_bytes else math.nan
