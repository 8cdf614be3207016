"""An exchange with something around each layer's way through it: a place for drills, a section for the monitor."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from launch.sections import Sections
from model.exchange import Exchange


class Around:
    """The exchange `inner`, each layer's `run` inside a context that `around` makes. Arguments pass through unseen."""

    def __init__(self, inner: Exchange, around: Callable[[], AbstractContextManager[None]]) -> None:
        self._inner, self._around = inner, around
        self.ep_size, self.ep_rank = inner.ep_size, inner.ep_rank

    def run(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        """As the inner exchange."""
        with self._around():
            return self._inner.run(*arguments, **named)


def in_section(exchange: Exchange, sections: Sections) -> Exchange:
    """The exchange, each layer's way through it being the section `exchange`; as it is where nothing travels."""
    return Around(exchange, lambda: sections.inside("exchange")) if exchange.ep_size > 1 else exchange
