"""Moves experts between ranks when a checkpoint is saved, so that the busiest rank has less to do; the model stays.

The new places are decided before the checkpoint is written and stand in its manifest; the experts are moved after it
was published, by reading it back: the weights and both moments of every moved expert, by its own name. A run that is
resumed from that checkpoint therefore starts from the places that the undisturbed run went on with.
"""

# M MoE layers, E routed experts, G ep_size

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch import balance_stats
from launch.telemetry import Telemetry
from model import slots
from model.transformer import Transformer
from parallel import checkpoint, placement
from parallel.config import BalanceConfig
from parallel.engine import Engine
from parallel.ranks import Ranks
from parallel.roots import Root


class Rebalancer:
    """Where the experts of one run lie, and the loads by which they are moved; the same on every rank.

    Args:
        config: placement and placement_min_gain.
        model: whose experts are placed. engine: which trains it. ranks: this rank's place.
        telemetry: for the events.
    """

    def __init__(
        self, config: BalanceConfig, model: Transformer, engine: Engine, ranks: Ranks, telemetry: Telemetry
    ) -> None:
        self.config = config
        self.model = model
        self.engine = engine
        self.ranks = ranks
        self.telemetry = telemetry
        self.ep_size = ranks.layout.ep_size
        self._shape = (len(model.config.moe_layers), model.config.n_routed_experts)
        self.active = config.placement == "load" and self.ep_size > 1 and self._shape[0] > 0
        self._loads = np.zeros(self._shape, dtype=np.int64)  # since the last checkpoint

    @property
    def table(self) -> Tensor | None:
        """(M, E) int64: the expert in each slot, slots in order of rank; None: each in the slot of its number."""
        now = slots.placement(self.model)
        return None if np.array_equal(now.numpy(), placement.identity(*self._shape)) else now

    def add(self, counts: Tensor) -> None:
        """Adds the tokens per expert of one step's global batch: (M, E) int64."""
        if self.active:
            self._loads += counts.cpu().numpy()

    def decide(self) -> np.ndarray:
        """The table (M, E) by the loads since the last checkpoint; the present one where nothing is gained."""
        current = slots.placement(self.model).numpy()
        if not self.active:
            return current
        return placement.balanced(self._loads, self.ep_size, current, self.config.placement_min_gain)

    def moves(self, table: np.ndarray) -> bool:
        """Whether an expert lies elsewhere in `table` than it does now."""
        return not np.array_equal(table, slots.placement(self.model).numpy())

    def forget(self) -> None:
        """Begins to count the loads anew, as each save does whether experts move or not."""
        self._loads = np.zeros(self._shape, dtype=np.int64)

    def manifest(self, table: np.ndarray) -> dict[str, Any]:
        """What the checkpoint says of the experts' places, for `start`; nothing where they do not move."""
        return {"placement": {"ep_size": self.ep_size, "expert_of_slot": table.tolist()}} if self.active else {}

    def start(self, manifest: dict[str, Any]) -> None:
        """Takes the places of a checkpoint before its tensors are loaded, if they were made for as many ranks as these.

        Otherwise, and where moving is switched off, every expert is in the slot of its number.

        Raises:
            CheckpointError: the checkpoint is of another model.
        """
        self._loads[:] = 0
        told = manifest.get("placement") or {}
        table = placement.identity(*self._shape)
        if self.active and told.get("ep_size") == self.ep_size:
            try:
                table = placement.validate(told["expert_of_slot"], *self._shape)
            except ValueError as error:
                raise checkpoint.CheckpointError(f"the checkpoint is of another model: {error}") from error
        slots.place(self.model, torch.from_numpy(table))

    def move(self, table: np.ndarray, path: Root, step: int) -> None:
        """Brings every expert to its place in `table` by way of the checkpoint just published; collective.

        A checkpoint that turns out to be damaged moves nothing: the experts stay, and an event says why.

        Args:
            table: from `decide`. path: the checkpoint, not one step old. step: steps done.
        """
        loads = self._loads
        self.forget()
        current = slots.placement(self.model).numpy()
        changed = np.flatnonzero((table != current).any(axis=1))
        if not changed.size:
            return
        began = time.perf_counter()
        try:
            checkpoint.load_moved(
                path, self.engine, lambda: slots.place(self.model, torch.from_numpy(table)), self.ranks.dp
            )
        except checkpoint.CheckpointError as error:
            self.telemetry.event("fault", cause=f"experts were not moved: {error}", step=step, path=str(path))
            return
        self.ranks.dp.barrier()
        self.telemetry.event(
            "placement",
            cause="loads since the last checkpoint",
            step=step,
            layers_changed=len(changed),
            experts_moved=int(placement.moved(current, table, self.ep_size).sum()),
            max_vio_rank_before=round(balance_stats.max_vio_rank(loads, self.ep_size, current), 6),
            max_vio_rank_expected=round(balance_stats.max_vio_rank(loads, self.ep_size, table), 6),
            seconds_taken=round(time.perf_counter() - began, 3),
        )
