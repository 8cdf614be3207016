"""The `data` section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from data.mirror import Remote
from data.storage import address_problems


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens a run reads and in what order.

    Attributes:
        path: folder of a packed dataset, or its address in a remote storage that fsspec knows (s3://bucket/corpus, gs,
            https, ...); with mode "stream" a folder, file or pattern of plain tar files.
        mixture: several datasets instead of `path`, folders or addresses, packed with one tokenizer.
        weights: share of each source in the sequences, in any unit; empty are equal shares.
        curriculum: weights that change, instead of `weights`: rows of a step from which on they hold (the first is 0,
            counted in batches of train.global_batch_size) and a weight for each source.
        seq_len: targets in one sequence; a sequence spans seq_len + 1 tokens.
        seed: seed of the order.
        packing: "split" concatenates documents and cuts every seq_len tokens, "best_fit" keeps documents whole where
            they fit and pads the rest with masked positions.
        lanes: number of contiguous reading positions in an epoch. Every data-parallel size that divides it gives the
            same global batches; 192 is divisible by 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96 and 192.
        window_shards: documents are shuffled inside windows of this many shards.
        cache_mb: memory for documents that were read and checked, in MiB per rank.
        cache_dir: folder of each node for a remote dataset's indexes and shards; empty is ~/.cache/trimtab/data.
            Several runs may share it.
        cache_gb: most GB (10^9 bytes) of remote shards kept on a node; 0 keeps none and reads samples by range.
        deadline_s: longest time for one file or range of a remote storage, all tries together.
        on_damage: "fail" stops at a damaged sample and names it; "quarantine" puts masked positions in the place of
            the sequences that it touches, counts them, and stops beyond `damage_budget`.
        damage_budget: the share of sequences that "quarantine" may mask before it stops.
        mode: "indexed" is the resumable stream; "stream" reads plain tar files without an index and cannot resume.
        tokenizer: for mode "stream" only, the tokenizer of samples that hold text: "bytes" or a tokenizer.json file.
    """

    path: str = "datasets/python"
    mixture: tuple[str, ...] = ()
    weights: Annotated[tuple[float, ...], "[0, 1e9]"] = ()
    curriculum: Annotated[tuple[tuple[float, ...], ...], "[0, 1e12]"] = ()
    seq_len: Annotated[int, "[1, 1e9]"] = 256
    seed: Annotated[int, "[0, 9223372036854775808)"] = 0
    packing: Literal["split", "best_fit"] = "split"
    lanes: Annotated[int, "[1, 1e7]"] = 192
    window_shards: Annotated[int, "[1, 1e7]"] = 16
    cache_mb: Annotated[int, "[1, 1e8]"] = 256
    cache_dir: str = ""
    cache_gb: Annotated[float, "[0, 1e8]"] = 16.0
    deadline_s: Annotated[float, "[0.001, 1e7]"] = 300.0
    on_damage: Literal["fail", "quarantine"] = "fail"
    damage_budget: Annotated[float, "[0, 1]"] = 1e-5
    mode: Literal["indexed", "stream"] = "indexed"
    tokenizer: str = "bytes"

    def _mixture_problems(self) -> list[str]:
        n, found = len(self.mixture), []
        if not n and (self.weights or self.curriculum):
            found.append("data.weights and data.curriculum need data.mixture; name the sources there")
        if self.weights and self.curriculum:
            found.append("data.weights and data.curriculum exclude each other; put the weights into its first row")
        if n and self.mode == "stream":
            found.append('data.mixture needs an index; use data.mode = "indexed"')
        if len(set(self.mixture)) < n:
            found.append("data.mixture names a source twice; raise its weight instead")
        rows = [("data.weights", self.weights)] if self.weights else []
        rows += [(f"data.curriculum[{place}]", row[1:]) for place, row in enumerate(self.curriculum)]
        for key, weights in rows:
            if n and (
                len(weights) != n or not all(0 <= weight < float("inf") for weight in weights) or not any(weights)
            ):
                found.append(f"{key} = {list(weights)} must be {n} weights from 0 up, one for each source, not all 0")
        steps = [row[0] if row else -1 for row in self.curriculum]
        if steps and (steps[0] != 0 or any(step != int(step) for step in steps) or sorted(set(steps)) != steps):
            found.append(f"data.curriculum begins at the steps {steps}; they must be whole, begin with 0 and rise")
        return found

    def remote(self) -> Remote:
        """How to reach a remote dataset."""
        return Remote(self.cache_dir, self.cache_gb, self.deadline_s)

    def problems(self) -> list[str]:
        """Every violated rule of this section, each starting with its dotted key."""
        found = []
        if not self.path:
            found.append("data.path is empty; give the folder of a packed dataset, for example datasets/python")
        for path in (self.path, *self.mixture):
            found += address_problems(path)
        found += self._mixture_problems()
        if self.cache_gb < 0:
            found.append(f"data.cache_gb = {self.cache_gb} is negative; use 0 to keep no remote shards")
        if not self.deadline_s > 0:
            found.append(f"data.deadline_s = {self.deadline_s} must be positive; use for example 300")
        for key, least in (("seq_len", 1), ("lanes", 1), ("window_shards", 1), ("cache_mb", 1)):
            value = getattr(self, key)
            if value < least:
                found.append(f"data.{key} = {value} is too small; use at least {least}")
        if not 0 <= self.seed < 2**63:
            found.append(f"data.seed = {self.seed} is out of range; use 0 to 2**63 - 1")
        if not 0.0 <= self.damage_budget <= 1.0:
            found.append(f"data.damage_budget = {self.damage_budget} is not a share; use a number from 0 to 1")
        for key, legal in (
            ("packing", ("split", "best_fit")),
            ("on_damage", ("fail", "quarantine")),
            ("mode", ("indexed", "stream")),
        ):
            if getattr(self, key) not in legal:
                found.append(f"data.{key} = {getattr(self, key)!r} is unknown; use one of {', '.join(legal)}")
        if self.mode == "stream" and self.packing != "split":
            found.append('data.packing = "best_fit" needs an index; use data.mode = "indexed" or packing = "split"')
        return found
