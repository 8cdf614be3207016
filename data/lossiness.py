"""What a tokenizer loses of the text: bytes that decoding does not give back, and unknown tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data.errors import DataError
from data.leftout import human, printable
from data.manifest import Loss
from data.tokenizer import DEEPSEEK, Tokenizer

if TYPE_CHECKING:
    from data.progress import PackState

ALLOWED = 0.01  # share of lost bytes, or of unknown tokens, beyond which packing asks


class LossMeter:
    """Measures a tokenizer while documents are encoded.

    The tokenizers of this project and DeepSeek's hold every byte by their making, and only the held-out documents are
    decoded; with a given file every document is.

    Args:
        encoder: the tokenizer.
        state: where the counts are kept, so that an interrupted packing goes on with them.
        total_bytes: of the whole text.
        allow: whether any loss is allowed.
    """

    def __init__(self, encoder: Tokenizer, state: PackState, total_bytes: int, allow: bool) -> None:
        self._encoder, self._state, self._total, self._allow = encoder, state, total_bytes, allow
        self.everything = encoder.spec not in ("bytes", DEEPSEEK) and not encoder.spec.startswith("bpe:")

    def take(self, name: str, data: bytes, ids: np.ndarray) -> None:
        """Measures one document.

        Args:
            name: the document's.
            data: its text.
            ids: (n,) its tokens, without an end token.

        Raises:
            DataError: more than `ALLOWED` of the whole text's bytes are lost by now.
        """
        state, unknown = self._state, self._encoder.unknown_id
        known = ids if unknown is None else ids[ids != unknown]
        decoded = self._encoder.decode_bytes(known.tolist())
        state.measured_bytes += len(data)
        state.measured_tokens += len(ids)
        state.unknown_tokens += len(ids) - len(known)
        if decoded == data:
            return
        state.lossless = False
        lost = lost_bytes(data, decoded)
        state.lost_bytes += lost
        if lost and not state.lossy_example:
            state.lossy_example = name
        if self.everything and state.lost_bytes > ALLOWED * self._total and not self._allow:
            raise DataError(self._refusal(f"the first {human(state.measured_bytes)} of the text"))

    def result(self) -> Loss | None:
        """The shares of lost bytes and unknown tokens; None for a tokenizer that lost nothing.

        Raises:
            DataError: one of them is more than `ALLOWED`.
        """
        state = self._state
        if state.lossless and not state.unknown_tokens:
            return None
        loss = Loss(
            round(state.lost_bytes / max(1, state.measured_bytes), 6),
            round(state.unknown_tokens / max(1, state.measured_tokens), 6),
        )
        if max(loss.lost_bytes, loss.unknown_tokens) > ALLOWED and not self._allow:
            raise DataError(self._refusal("the text"))
        return loss

    def _refusal(self, text: str) -> str:
        state = self._state
        lost, unknown = state.lost_bytes / state.measured_bytes, state.unknown_tokens / max(1, state.measured_tokens)
        example = f" (the first is {printable(state.lossy_example)})" if state.lossy_example else ""
        return (
            f"tokenizer {self._encoder.spec}: of {text}, {lost:.1%} of the bytes are lost by it{example} and "
            f"{unknown:.1%} of its tokens are the unknown token; more than {ALLOWED:.0%} of all is refused, since bits "
            f"per byte would mean nothing; use bytes, bpe:N, deepseek or another tokenizer.json that holds every byte, "
            f"or pack with --allow-lossy"
        )


def lost_bytes(data: bytes, decoded: bytes) -> int:
    """How many bytes of a text are not in what was decoded, by value and wherever they stand: at least so many are
    lost."""
    counts = [np.bincount(np.frombuffer(raw, np.uint8), minlength=256) for raw in (data, decoded)]
    return int(np.maximum(counts[0] - counts[1], 0).sum())
