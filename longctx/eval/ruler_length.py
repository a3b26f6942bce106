"""RULER's effective length: which one the averages tell, how surely, and when they tell none.

NVIDIA's is the largest length whose average over tasks reaches a threshold. A few lucky prompts
reach any threshold, so none is told below `ENOUGH` prompts of each task, and beside it stands which
it would be at either end of the averages' 95% intervals. Read from results, so it costs nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ENOUGH = 25  # prompts of each task: the average of 13 tasks about 85 % is then sure to 4 points


@dataclass(frozen=True)
class Effective:
    """An effective length, tokens; 0 where no tested length is.

    Args:
        length: by the averages.
        least: by the lower ends of their intervals.
        most: by the upper ends.
    """

    length: int
    least: int
    most: int

    def __str__(self) -> str:
        named = [f"{n:,}" if n else "none" for n in (self.length, self.least, self.most)]
        return named[0] if self.least == self.most else f"{named[0]} [{named[1]}, {named[2]}]"


def effective_length(
    averages: Sequence[dict[str, Any]],
    threshold: float,
    score: Callable[[dict[str, Any]], float] = lambda average: float(average["score"]),
) -> int:
    """The largest length whose average reaches the threshold; 0 if none does.

    Args:
        averages: `length` and `score` (0 to 1) of each.
        threshold: per cent.
        score: what is taken of an average.
    """
    return max((a["length"] for a in averages if 100 * score(a) >= threshold), default=0)


def effective(result: dict[str, Any]) -> Effective | None:
    """What a result tells; None where a task had too few prompts.

    Args:
        result: of the task `ruler`: `cells`, `averages` and `threshold`.
    """
    if min(cell["samples"] for cell in result["cells"]) < ENOUGH:
        return None
    averages, threshold = result["averages"], result["threshold"]
    return Effective(
        effective_length(averages, threshold),
        effective_length(averages, threshold, lambda a: a["interval"][0]),
        effective_length(averages, threshold, lambda a: a["interval"][1]),
    )
