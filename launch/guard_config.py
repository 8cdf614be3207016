"""The `guard` section of the configuration."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class GuardConfig:
    """What is done about steps whose numbers look wrong; see docs/guard.md.

    max_skips: a step whose loss or gradient is not finite is skipped; so many skips in a row stop the run.
    spike_window: kept steps that loss and gradient norm are compared with; 0 looks for no spikes.
    spike_sigmas: a spike lies so many robust standard deviations above their median, and is skipped.
    max_spikes: so many spikes in a row are skipped; after that the new level counts as real, or the run goes back.
    rollback_steps: 0 never goes back. Else, instead of stopping or taking a new level as real, the run goes back to a
        checkpoint at least so many steps older, and leaves the data of the skipped steps out from then on.
    max_rollbacks: so often; then it stops.
    drift_window: kept steps whose medians are compared to find a loss or gradient norm that creeps up; 0 does not look.
    weight_growth: an alarm when the weights of the routers or of the output layer are so many times as large as at the
        start; 0 does not look.
    check_replicas_every_steps: compare what several ranks hold, and look at the weights' growth, so often; 0 never.
    """

    max_skips: Annotated[int, "[1, 1e9]"] = 10
    spike_window: Annotated[int, "0 or [16, 1e6]"] = 128
    spike_sigmas: Annotated[float, "[3, 1e9]"] = 10.0
    max_spikes: Annotated[int, "[1, 1e9]"] = 3
    rollback_steps: Annotated[int, "[0, 1e9]"] = 0
    max_rollbacks: Annotated[int, "[1, 1e9]"] = 2
    drift_window: Annotated[int, "[0, 1e6]"] = 100
    weight_growth: Annotated[float, "0 or (1, 1e9]"] = 10.0
    check_replicas_every_steps: Annotated[int, "[0, 1e9]"] = 100

    def problems(self) -> list[str]:
        """Returns every broken rule of this section, each starting with its dotted key."""
        found = []
        for key in ("max_skips", "max_spikes", "max_rollbacks"):
            if getattr(self, key) < 1:
                found.append(f"guard.{key} = {getattr(self, key)} must be at least 1")
        for key in ("rollback_steps", "drift_window", "check_replicas_every_steps"):
            if getattr(self, key) < 0:
                found.append(f"guard.{key} = {getattr(self, key)} must not be negative; 0 switches it off")
        if self.spike_window != 0 and self.spike_window < 16:
            found.append(
                f"guard.spike_window = {self.spike_window} is too few steps to tell a spike from noise; use 16 or "
                "more, or 0 to look for none"
            )
        if not self.spike_sigmas >= 3:
            found.append(
                f"guard.spike_sigmas = {self.spike_sigmas} would skip ordinary steps; use 3 or more, or "
                "guard.spike_window = 0 to look for no spikes"
            )
        if self.weight_growth != 0 and not self.weight_growth > 1:
            found.append(f"guard.weight_growth = {self.weight_growth} must be more than 1, or 0 to switch it off")
        return found
