"""The `data` section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which tokens a run reads and in what order.

    Everything here except `cache_mb` decides the order of the data, so a resumed run must keep it.

    Attributes:
        path: folder of a packed dataset (with mode "stream": a folder, file or pattern of plain tar files).
        seq_len: targets in one sequence; a sequence spans seq_len + 1 tokens.
        seed: seed of the order.
        packing: "split" concatenates documents and cuts every seq_len tokens, "best_fit" keeps documents whole where
            they fit and pads the rest with masked positions.
        lanes: number of contiguous reading positions in an epoch. Every data-parallel size that divides it gives the
            same global batches; 192 is divisible by 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96 and 192.
        window_shards: documents are shuffled inside windows of this many shards.
        cache_mb: memory for documents that were read and checked, in MiB per rank.
        on_damage: "fail" stops at a damaged sample and names it; "quarantine" puts masked positions in the place of
            the sequences that it touches, counts them, and stops beyond `damage_budget`.
        damage_budget: the share of sequences that "quarantine" may mask before it stops.
        mode: "indexed" is the resumable stream; "stream" reads plain tar files without an index and cannot resume.
        tokenizer: for mode "stream" only, the tokenizer of samples that hold text: "bytes" or a tokenizer.json file.
    """

    path: str = "datasets/python"
    seq_len: int = 256
    seed: int = 0
    packing: Literal["split", "best_fit"] = "split"
    lanes: int = 192
    window_shards: int = 16
    cache_mb: int = 256
    on_damage: Literal["fail", "quarantine"] = "fail"
    damage_budget: float = 1e-5
    mode: Literal["indexed", "stream"] = "indexed"
    tokenizer: str = "bytes"

    def problems(self) -> list[str]:
        """Every violated rule of this section, each starting with its dotted key."""
        found = []
        if not self.path:
            found.append("data.path is empty; give the folder of a packed dataset, for example datasets/python")
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
