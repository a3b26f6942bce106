"""Passkey retrieval: five digits in filler, over length x depth (`longctx/eval/quiz.py`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from longctx.eval.answers import wilson
from longctx.eval.evaluation import Evaluation
from longctx.eval.figures import WINDOWS, depth_maps
from longctx.eval.headline import Column, at_lengths, cells_of, share
from longctx.eval.quiz import MODES, check_depths, check_mode, found_at, grid, quiz_of
from longctx.eval.results import Results
from longctx.eval.subject import Subject
from longctx.eval.tables import image, length_table, percent
from longctx.eval.task import Found, Task, TaskResult


@dataclass(frozen=True)
class Passkey(Task):
    """Five digits hidden in filler, over length and depth.

    Args:
        depths: places of the key, 0 (start of the prompt) to 1 (end).
        mode: `teacher_forced` (one forward a prompt) `| generate` (through the cache).
    """

    place: ClassVar[int] = 20
    by_length: ClassVar[bool] = True

    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    mode: str = "teacher_forced"

    def __post_init__(self) -> None:
        check_mode(self.mode, "passkey.mode")
        check_depths(self.depths, "passkey.depths")

    @property
    def one_pass(self) -> bool:
        """Unless it decodes."""
        return self.mode == "teacher_forced"

    def inputs(self, cfg: Evaluation) -> dict[str, Any]:
        """The number of prompts and their seed."""
        return {"samples": cfg.samples, "seed": cfg.seed}

    def run(self, cfg: Evaluation, subject: Subject) -> TaskResult:
        """The share found in each cell of length x depth, and one record a prompt."""
        quiz = quiz_of(cfg, subject, self.mode, cfg.samples)
        return grid(quiz, sorted(cfg.lengths), self.depths, task=self.name)

    @classmethod
    def section(cls, found: Found, out: Path) -> Iterator[str]:
        """Keys found by length, and a map of length x depth."""
        own = found[0][1]
        yield from ("## Passkey", "")
        yield (
            f"Keys retrieved, %, mean over {len({c['depth'] for c in own['cells']})} depths and "
            f"{own['cells'][0]['samples']} prompts a cell, exact match, {MODES[own['mode']]}; "
            "columns: tokens of the prompts; 95% Wilson intervals; prompts truncated: 0; guessing: "
            "0.00."
        )
        yield ""
        rows = {
            model["label"]: {
                length: percent(right / asked, wilson(right, asked))
                for length, (right, asked) in found_at(result["cells"]).items()
            }
            for model, result in found
        }
        yield from length_table(rows)
        models = [model for model, _ in found]
        figure = depth_maps(models, cls.name, "key", out / "passkey.png")
        yield from image(f"Keys found; {WINDOWS}", figure)

    @classmethod
    def columns(cls, models: Sequence[Results]) -> Iterator[Column]:
        """The share of keys found, over all depths."""
        rows = [
            {n: share(*counts) for n, counts in found_at(cells_of(m, cls.name)).items()}
            for m in models
        ]
        yield from at_lengths(models, rows, "passkey at {at}, %", percent)
