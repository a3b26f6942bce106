"""Steps that would do harm are left out: nothing is updated, they are counted, the run goes on.

Bad is a loss or a gradient norm that is not finite and, where `train.skip_above` asks for it, a
norm far above what was usual. All ranks see the same two numbers, so all decide alike. Costs
nothing: the norm is the one that clipping needs.
"""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from longctx.config import TrainConfig
from longctx.errors import UserError

WINDOW = 100  # accepted steps whose median norm is the usual one
FEWEST = 20  # of them before any norm counts as unusual


class DivergedError(UserError):
    """The run no longer gets anywhere. All ranks raise it at the same step."""


@dataclass
class Guard:
    """Which steps are taken. Its state is kept with each checkpoint.

    Args:
        config: `max_skipped` and `skip_above`.
        skipped: steps left out so far.
        in_a_row: of them, those since the last accepted one.
        norms: gradient norms of the last accepted steps, before clipping; oldest first.
    """

    config: TrainConfig
    skipped: int = 0
    in_a_row: int = 0
    norms: list[float] = field(default_factory=list)

    def accepts(self, loss: float, norm: float) -> bool:
        """Whether a step of this loss and gradient norm is to be taken."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return False
        limit = self.config.skip_above
        if not limit or len(self.norms) < FEWEST:
            return True
        return norm <= limit * statistics.median(self.norms)

    def note(self, step: int, loss: float, norm: float, taken: bool) -> str | None:
        """Counts a step that is over.

        Args:
            step: its number, from 1.
            loss: its loss.
            norm: its gradient norm.
            taken: True if the step was accepted.

        Returns:
            A line about a step that was left out; None for one that was taken.

        Raises:
            DivergedError: if it is one too many in a row.
        """
        if taken:
            self.in_a_row = 0
            self.norms = [*self.norms, norm][-WINDOW:]
            return None
        self.skipped += 1
        self.in_a_row += 1
        seen = f"the loss is {loss:.4g}, the gradient norm {norm:.4g}"
        if self.in_a_row >= self.config.max_skipped:
            raise DivergedError(
                f"step {step}: {seen}; that is bad step number {self.in_a_row} in a row "
                f"(train.max_skipped={self.config.max_skipped}). None of them was taken, and what "
                "is saved is finite. Lower optim.lr?"
            )
        if self.norms and math.isfinite(loss) and math.isfinite(norm):
            seen += f", usual is {statistics.median(self.norms):.4g}"
        return f"warning: step {step} skipped: {seen} ({self.skipped} skipped so far)"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able and exact."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "norms": self.norms}
