"""Where a rank's batches come from: the resumable stream over packed data, or plain tar files (data.mode "stream")."""

from dataclasses import dataclass
from typing import Any

from data.dataset import Dataset
from data.foreign import ForeignStream
from data.mixture import MixedDataset, open_data, plan_of
from data.stream import Stream
from launch.config import Config

NO_FINGERPRINT = "plain tar files, not resumable"


@dataclass
class Feed:
    """The stream of one rank, and the dataset behind it; plain tar files have none."""

    stream: Stream | ForeignStream
    dataset: Dataset | MixedDataset | None

    @property
    def fingerprint(self) -> str:
        """What a checkpoint records of the data."""
        return self.dataset.fingerprint if self.dataset else NO_FINGERPRINT

    def news(self, last: bool = False) -> dict[str, Any] | None:
        """What plain tar files held, once, see `ForeignStream.news`; None for packed data."""
        return self.stream.news(last) if isinstance(self.stream, ForeignStream) else None

    def figures(self) -> dict[str, Any]:
        """What a step's record says of plain tar files."""
        return self.stream.figures() if isinstance(self.stream, ForeignStream) else {}

    def close(self) -> None:
        """Ends background reading and closes files."""
        self.stream.close()
        if self.dataset:
            self.dataset.close()


def open_feed(config: Config, dp_rank: int, dp_size: int) -> Feed:
    """Opens the data of one rank.

    Raises:
        DataError: the data cannot be used; says why and what to do.
    """
    sizes = (dp_rank, dp_size, config.train.global_batch_size, config.train.micro_batch_size)
    if config.data.mode == "stream":
        return Feed(ForeignStream(config.data, *sizes), None)
    dataset = open_data(config.data)
    stream = Stream(
        dataset,
        plan_of(dataset, config.data, config.train.global_batch_size),
        *sizes,
        cache_mb=config.data.cache_mb,
        on_damage=config.data.on_damage,
        damage_budget=config.data.damage_budget,
        timeout_s=max(600.0, 2 * config.data.deadline_s),
    )
    return Feed(stream, dataset)
