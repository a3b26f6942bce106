"""RULER's scores: references found in a reply, averages over tasks, and the effective length.

NVIDIA's effective length is the largest length whose average over tasks reaches a threshold. A few
lucky prompts reach any threshold, so none is given below `ENOUGH` prompts of each task; the report
also gives the lengths at either end of the averages' 95% intervals. Costs nothing.
Source: RULER (2404.06654) and its code, package nvidia-long-context-eval 26.3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from longctx.eval.answers import Z, interval

ENOUGH = 25  # prompts of each task: the average of 13 tasks about 85 % is then sure to 4 points


def match_all(prediction: str, references: Sequence[str]) -> float:
    """The share of references that are in the prediction, whatever the case."""
    found = prediction.lower()
    return sum(reference.lower() in found for reference in references) / len(references)


def match_part(prediction: str, references: Sequence[str]) -> float:
    """1 if any of the references is in the prediction, whatever the case, else 0."""
    found = prediction.lower()
    return float(any(reference.lower() in found for reference in references))


def row(
    task: str, length: int, records: Sequence[dict[str, Any]], new_tokens: int
) -> dict[str, Any]:
    """The result of a cell.

    Args:
        task: one of RULER's.
        length: of its prompts, tokens.
        records: of the cell, with `score`, `tokens` and `prediction`.
        new_tokens: most tokens of an answer.
    """
    scores = [float(r["score"]) for r in records]
    n, tokens = len(scores), [r["tokens"] for r in records]
    mean = sum(scores) / n
    spread = sum((s - mean) ** 2 for s in scores) / max(1, n - 1)
    low, high = interval(scores)
    return {
        "task": task,
        "length": length,
        "samples": n,
        "score": mean,
        "interval": [low, high],
        # A few samples that are all right do not make the score sure.
        "variance": max(spread / n, ((high - low) / 2 / Z) ** 2),
        "empty": sum(not r["prediction"] for r in records),
        "tokens": [min(tokens), max(tokens)],
        "new_tokens": new_tokens,
    }


def average(rows: Sequence[dict[str, Any]], length: int) -> dict[str, Any]:
    """Mean over tasks at a length; 95% interval by the normal law, tasks being strata.

    Args:
        rows: with `length`, `score` and `variance` (of the score of the row, as a mean).
        length: of the rows to take.
    """
    inside = [r for r in rows if r["length"] == length]
    score = sum(r["score"] for r in inside) / len(inside)
    half = Z * sqrt(sum(r["variance"] for r in inside)) / len(inside)
    bounds = [max(0.0, score - half), min(1.0, score + half)]
    return {"length": length, "score": score, "interval": bounds, "tasks": len(inside)}


def weighted(averages: Sequence[dict[str, Any]], rising: bool) -> float:
    """Mean over lengths with weights 1, 2, .. from the shortest, or from the longest."""
    ordered = sorted(averages, key=lambda a: a["length"] if rising else -a["length"])
    total = sum(weight * a["score"] for weight, a in enumerate(ordered, 1))
    return float(total / sum(range(1, len(ordered) + 1)))


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
    """The effective length of a result; None where a task had too few prompts.

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
