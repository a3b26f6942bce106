"""Position Interpolation's effective window, k_max: how far back a key is still found."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from longctx.config.typed import positive
from longctx.data.passkey_text import build_at_distance
from longctx.errors import UserError
from longctx.eval.evaluation import Evaluation
from longctx.eval.figures import GREY, SIZE, legend, look, new_axes, save, window_lines
from longctx.eval.headline import Column, certain, count
from longctx.eval.quiz import Quiz, Trial, check_mode, quiz_of, rate, run_trials
from longctx.eval.results import Results, result_of
from longctx.eval.subject import Subject
from longctx.eval.tables import image, table
from longctx.eval.task import Found, Sample, Task, TaskResult


@dataclass(frozen=True)
class KMax(Task):
    """Position Interpolation's effective window, up to the longest length.

    Args:
        points: distances tested, uniformly spaced up to the longest of `lengths`.
        threshold: success rate that every shorter distance must reach, 0 to 1.
        mode: `teacher_forced` (one forward a prompt) `| generate` (through the cache).
    """

    place: ClassVar[int] = 30
    by_length: ClassVar[bool] = True

    points: int = 16
    threshold: float = 0.2
    mode: str = "teacher_forced"

    def __post_init__(self) -> None:
        positive(self.points, "k_max.points")
        check_mode(self.mode, "k_max.mode")
        if not 0 < self.threshold <= 1:
            raise UserError(f"k_max.threshold={self.threshold} must be above 0 and at most 1")

    @property
    def one_pass(self) -> bool:
        """Unless it decodes."""
        return self.mode == "teacher_forced"

    def inputs(self, cfg: Evaluation) -> dict[str, Any]:
        """The number of prompts and their seed."""
        return {"samples": cfg.samples, "seed": cfg.seed}

    def run(self, cfg: Evaluation, subject: Subject) -> TaskResult:
        """`k_max`, the rate at each distance, and one record a prompt."""
        quiz = quiz_of(cfg, subject, self.mode, cfg.samples)
        return effective_window(quiz, max(cfg.lengths), self.points, self.threshold)

    @classmethod
    def section(cls, found: Found, out: Path) -> Iterator[str]:
        """The effective window of each model, and success by distance."""
        yield from ("## Effective window, k_max", "")
        yield (
            "The largest distance between a key and the end of its prompt up to which keys are "
            "found at the threshold's rate or better at every distance tested (Position "
            "Interpolation's effective window). Target: length of the prompts; trials: distances x "
            "prompts at each."
        )
        yield ""
        rows = []
        for model, own in found:
            trials = f"{len(own['cells'])} x {own['cells'][0]['samples']}"
            limit = f"{100 * own['threshold']:.0f} %"
            mode = own["mode"].replace("_", " ")
            cells = [f"{own['k_max']:,}", f"{own['target']:,}", trials, limit, mode]
            rows.append([model["label"], *cells])
        yield from table(["model", "k_max, tokens", "target", "trials", "threshold", "mode"], rows)
        figure = k_max_figure([model for model, _ in found], out / "k_max.png")
        yield from image("Passkey by distance", figure)

    @classmethod
    def columns(cls, models: Sequence[Results]) -> Iterator[Column]:
        """k_max; it has no interval."""
        values = [(result_of(m, cls.name) or {}).get("k_max") for m in models]
        yield Column("k_max, tokens", certain(values), count, ranked=False)


def k_max(distances: Sequence[int], rates: Sequence[float], threshold: float) -> int:
    """The largest distance k such that the rate reaches the threshold at every k' <= k.

    One dip ends the window, however well the model does beyond it.
    Source: Position Interpolation (2306.15595) section 3.3.

    Args:
        distances: tested k, tokens, in any order.
        rates: success rate at each, 0 to 1.
        threshold: 0.2 in the paper.

    Returns:
        k in tokens; 0 if the shortest distance fails already.
    """
    reached = 0
    for k, share in sorted(zip(distances, rates, strict=True)):
        if share < threshold:
            break
        reached = k
    return reached


def effective_window(
    quiz: Quiz, target: int, points: int, threshold: float
) -> tuple[dict[str, Any], list[Sample]]:
    """k_max for a target window: keys at `points` uniformly spaced distances from the end.

    Distances beyond what the prompt has room for put the key right after the instruction; each
    cell records the distances that were reached.

    Args:
        quiz: model, prompts and mode.
        target: L', tokens: every prompt is about that long.
        points: number of distances, L'/points apart; 32 in the paper.
        threshold: see `k_max`.

    Returns:
        The result (`k_max`, `cells`: one row a distance) and one record a prompt.
    """
    distances = [target * i // points for i in range(1, points + 1)]

    def trials() -> Iterator[Trial]:
        for k, index in product(distances, range(quiz.samples)):
            prompt = build_at_distance(quiz.encode, quiz.bos_id, target, k, quiz.seed, index)
            yield Trial(prompt, target, None, k, index)

    records = run_trials(quiz, trials(), points * quiz.samples, "k_max")
    cells = [rate(records, k=k) for k in distances]
    return {
        "mode": quiz.mode,
        "target": target,
        "k_max": k_max(distances, [cell["rate"] for cell in cells], threshold),
        "threshold": threshold,
        "truncated_prompts": 0,
        "cells": cells,
    }, records


def k_max_figure(models: Sequence[Results], path: Path) -> str:
    """Success against the distance of the key, a line per model, k_max in the legend.

    Args:
        models: contents of `results.json` that hold the task.
        path: PNG to write.

    Returns:
        The file's name.
    """
    figure, axes = new_axes(*SIZE)
    for i, model in enumerate(models):
        result = result_of(model, "k_max") or {}
        axes.plot(
            [c["k"] for c in result["cells"]],
            [100 * c["rate"] for c in result["cells"]],
            label=f"{model['label']}: k_max {result['k_max']:,} of {result['target']:,}",
            **look(model, i),
            markersize=4,
            linewidth=1.4,
        )
    for threshold in {model["tasks"]["k_max"]["settings"]["threshold"] for model in models}:
        axes.axhline(100 * threshold, color=GREY, linewidth=1, label="threshold")
    window_lines(axes, models)
    axes.set_ylim(-4, 104)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_xlabel("distance from the key to the end, tokens")
    axes.set_ylabel("keys retrieved, %")
    axes.set_title("Passkey by distance", fontsize=11)
    legend(figure)
    return save(figure, path)
