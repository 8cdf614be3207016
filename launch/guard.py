"""Judges each step from numbers that every rank shares, so that all ranks decide alike."""

import math
from dataclasses import dataclass


class TrainingDivergedError(RuntimeError):
    """Too many steps in a row had no finite loss or gradient."""


@dataclass(frozen=True)
class Verdict:
    """keep: apply the step. reason: why not, else empty."""

    keep: bool
    reason: str = ""


class Guard:
    """Skips steps whose loss or gradient norm is not finite; stops when that does not end.

    Args:
        patience: so many skipped steps in a row stop the run.
    """

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        self.skipped_in_a_row = 0

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """Judges one step.

        Args:
            step: number of the step, 0-based. loss, grad_norm: global figures, equal on every rank.

        Raises:
            TrainingDivergedError: on every rank, after `patience` skipped steps in a row.
        """
        wrong = [f"{name} is {value}" for name, value in (("loss", loss), ("gradient norm", grad_norm))
                 if not math.isfinite(value)]  # fmt: skip
        if not wrong:
            self.skipped_in_a_row = 0
            return Verdict(True)
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.patience:
            raise TrainingDivergedError(
                f"step {step + 1}: {' and '.join(wrong)}, for the {self.skipped_in_a_row}th step in a row; go back to "
                "an earlier checkpoint with a lower optimizer.lr, or find the first with train.finite_checks=true"
            )
        return Verdict(False, " and ".join(wrong))
