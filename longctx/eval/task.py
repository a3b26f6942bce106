"""The contract of an evaluation task: one frozen dataclass in a file of `longctx/eval/tasks/`.

Every file there is a task, named like the file: `evaluate.py tasks=[NAME]` runs it,
`NAME.KEY=VALUE` sets its numbers, `--help` shows the first line of its docstring, and its section
is part of the report. `docs/how-to/evaluation-task.md` adds one step by step.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from longctx.eval.evaluation import Evaluation
from longctx.eval.headline import Column
from longctx.eval.results import FACTS, Results
from longctx.eval.subject import Subject, digest_of, open_store

Sample = dict[str, Any]
TaskResult = tuple[dict[str, Any], list[Sample]]
Found = Sequence[tuple[Results, dict[str, Any]]]


@dataclass(frozen=True)
class Task(ABC):
    """One task: its settings are the fields of a subclass, each with a default.

    The defaults are the numbers of `effort=quick`; `conf/effort/paper.yaml` holds those of the
    paper where they differ. Wrong settings raise `UserError` in `__post_init__`.

    Attributes:
        name: of the file, and of the task everywhere.
        place: order of its section in a report; smaller ones come first.
        by_length: it is measured at each of `lengths`.
        compared_by: facts of a model (`results.json`) that change its numbers besides
            the settings: models compare fairly only where these are equal too.
    """

    name: ClassVar[str]
    place: ClassVar[int] = 1000
    by_length: ClassVar[bool] = False
    compared_by: ClassVar[tuple[str, ...]] = FACTS

    def __init_subclass__(cls) -> None:
        cls.name = cls.__module__.rpartition(".")[2]

    @property
    def of_a_store(self) -> bool:
        """Whether it reads the token store `held_out`."""
        return False

    @property
    def one_pass(self) -> bool:
        """Whether it only scores whole rows in a forward pass, so that ranks can share a row."""
        return False

    @property
    def longest(self) -> int | None:
        """Its longest input besides `lengths`, tokens; None where the settings do not say."""
        return None

    def check(self, cfg: Evaluation) -> None:
        """Raises UserError where the settings do not fit those that all tasks share."""
        return

    def inputs(self, cfg: Evaluation) -> dict[str, Any]:
        """What the numbers depend on besides settings and lengths, as JSON values.

        A result is measured again when this changes, and models compare fairly only where it is
        equal. Called before any task runs, so missing data is reported at once. The default: the
        seed, and the content of `held_out` where the task reads it.

        Raises:
            UserError: if something that the task reads is missing or does not fit.
        """
        store = {"held_out": digest_of(open_store(cfg))} if self.of_a_store else {}
        return {**store, "seed": cfg.seed}

    @abstractmethod
    def run(self, cfg: Evaluation, subject: Subject) -> TaskResult:
        """Measures the model.

        Args:
            cfg: settings that all tasks share.
            subject: the model under test, its tokenizer, and the journal through which all work is
                done (`longctx/eval/journal.py`), so that ranks share it and a killed run goes on.

        Returns:
            The result (JSON) and one record a prompt, the lines of `samples.jsonl`.

        Raises:
            UserError: if a prompt or a text does not fit; nothing is ever truncated.
        """

    @classmethod
    @abstractmethod
    def section(cls, found: Found, out: Path) -> Iterator[str]:
        """Lines of Markdown for the report: a heading, what was asked, a table, a figure.

        Args:
            found: each model of the report (`results.json`) that has a result, and that result.
            out: directory to draw figures into.
        """

    @classmethod
    def columns(cls, models: Sequence[Results]) -> Iterator[Column]:
        """Columns of the report's first table, the main numbers of the task; by default none.

        Args:
            models: of the report, in the order of its rows; some may lack the task.
        """
        yield from ()
