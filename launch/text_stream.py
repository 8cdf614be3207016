"""One row's text while its tokens come: whole characters only, and nothing that may be the start of a stop string."""

import codecs
from collections.abc import Callable, Iterable, Sequence


class TextStream:
    """Turns new tokens into text that can be shown at once.

    A token may be a part of a character, and in some vocabularies its text depends on the tokens before it. So a window
    of the last tokens is decoded twice, without and with the new ones, and the difference is what they add; bytes wait
    until they are a whole character. Text that could still become a stop string waits too.

    Attributes:
        stopped: a stop string was met; no text follows, and neither it nor what came behind it was given out.
    """

    def __init__(
        self, decode_bytes: Callable[[Iterable[int]], bytes], stops: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        """Begin.

        Args:
            decode_bytes: the tokenizer's.
            stops: texts that end the row, none of them empty.
            before: the prompt's last tokens, as context for the first new one; no text of theirs is given out.
        """
        self._decode_bytes, self._stops = decode_bytes, list(stops)
        self._window = list(before)
        self._old = len(self._window)  # tokens of the window whose text is out
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens make safe to show."""
        if self.stopped or not tokens:
            return ""
        self._window += tokens
        known, whole = self._decode_bytes(self._window[: self._old]), self._decode_bytes(self._window)
        if whole.endswith("\N{REPLACEMENT CHARACTER}".encode()):
            return ""  # a vocabulary that decodes to text shows this for a character whose other part is to come
        self._window, self._old = self._window[self._old :], len(self._window) - self._old
        return self._release(self._characters.decode(whole[len(known) :]), last=False)

    def finish(self) -> str:
        """What is left once no token follows; a character that stayed incomplete is replaced."""
        if self.stopped:
            return ""
        rest = self._decode_bytes(self._window)[len(self._decode_bytes(self._window[: self._old])) :]
        self._window, self._old = [], 0
        return self._release(self._characters.decode(rest, final=True), last=True)

    def _release(self, new: str, *, last: bool) -> str:
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, `stop` itself left out."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
