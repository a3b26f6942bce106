"""Short contexts: what an extension of the window may have cost where it was not needed.

`continuation` (ours): the sentence that follows some held-out text among three of other documents;
the likeliest per token is the model's choice, guessing is right once in four. `boolq`, `piqa`,
`race`, `winogrande` and `mmlu` are lm-eval's own (`longctx/eval/harness.py`); they need lm-eval and
the hub, or its cache. Costs four short forwards a question of ours.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from longctx.config.typed import choice, positive
from longctx.errors import UserError
from longctx.eval import harness
from longctx.eval.answers import wilson
from longctx.eval.evaluation import Evaluation
from longctx.eval.headline import Column, Value, bounded, cells_of, mean
from longctx.eval.results import Results
from longctx.eval.ruler.material import sentences
from longctx.eval.score import token_nll
from longctx.eval.scored_windows import Documents
from longctx.eval.subject import Subject, check_vocabulary, open_store
from longctx.eval.tables import percent, table
from longctx.eval.task import Found, Sample, Task, TaskResult

OURS, THEIRS = "continuation", ("boolq", "piqa", "race", "winogrande", "mmlu")
CHOICES = 4
WORDS = (4, 40)  # fewest and most words of a choice
BEYOND = 128  # tokens behind the context in which that sentence must lie
QUESTIONS = 1000  # of ours, where no number is given
PATIENCE = 100  # draws for one question before the text is refused


@dataclass(frozen=True)
class Short(Task):
    """What an extension cost at short contexts: the right choice among several.

    Args:
        tasks: `continuation` (ours, of `held_out`) `| boolq | piqa | race | winogrande | mmlu`
            (lm-eval's) or a task in `include`, one or more.
        samples: questions of each. None: all of lm-eval's, and 1,000 of ours.
        context_tokens: most tokens of text before the choices.
        include: folder of task files (YAML) in lm-eval's format, of any data: multiple choice
            with the metric `acc`. None: nothing but the tasks above.
    """

    place: ClassVar[int] = 70

    tasks: list[str] = field(default_factory=lambda: [OURS])
    samples: int | None = 100
    context_tokens: int = 96
    include: str | None = None

    def __post_init__(self) -> None:
        known = (OURS, *THEIRS)
        for task in self.tasks if self.include is None else ():
            choice(task, known, "short.tasks")
        if not self.tasks:
            raise UserError(f"short.tasks=[] must name at least one of {', '.join(known)}")
        positive(self.context_tokens, "short.context_tokens")
        if self.samples is not None:
            positive(self.samples, "short.samples")

    @property
    def of_a_store(self) -> bool:
        """For questions of ours."""
        return OURS in self.tasks

    @property
    def theirs(self) -> list[str]:
        """The tasks that lm-eval asks."""
        return [task for task in self.tasks if task != OURS]

    def inputs(self, cfg: Evaluation) -> dict[str, Any]:
        """The store and the seed, the version of lm-eval and the files of its tasks."""
        found = {"seed": cfg.seed} | super().inputs(cfg)
        if self.theirs:
            found["lm_eval"] = harness.harness(self.theirs).__version__
        if self.include is not None:
            found["include"] = _contents(Path(self.include))
        return found

    def run(self, cfg: Evaluation, subject: Subject) -> TaskResult:
        """One row a task of `short.tasks`, and one record a question of ours."""
        records, rows, journal = list[Sample](), list[dict[str, Any]](), subject.journal
        if self.of_a_store:
            total = self.samples or QUESTIONS
            asked = enumerate(self._reading(cfg, subject).questions(total, cfg.seed))
            records = journal.each(
                OURS, asked, lambda pair: _answer(pair[1], pair[0], subject), total=total
            )
            rows.append(_row(OURS, "acc per token", records, 1 / CHOICES))
        rows += journal.each(
            "lm-eval",
            self.theirs,
            lambda task: harness.ask(task, subject, self.include, self.samples, cfg.seed),
            unit="task",
            alone=True,
        )
        return {"context_tokens": self.context_tokens, "cells": rows}, records

    def _reading(self, cfg: Evaluation, subject: Subject) -> "Reading":
        store = open_store(cfg)
        size = self.context_tokens
        return Reading(store, subject.encode, subject.decode, size, str(store.path))

    @classmethod
    def section(cls, found: Found, out: Path) -> Iterator[str]:
        """A row a model and task."""
        yield from ("## Short contexts", "")
        yield (
            "Per cent with 95% intervals. `continuation` is ours: the sentence that follows some "
            "held-out text among three of other documents, the likeliest per token; the others are "
            "lm-eval's, with its prompts."
        )
        yield ""
        rows = []
        for model, result in found:
            for cell in result["cells"]:
                guess = "" if cell["guessing"] is None else f"{100 * cell['guessing']:.1f}"
                about = [f"`{cell['kind']}`", cell["metric"], f"{cell['samples']:,}"]
                score = percent(cell["score"], cell["interval"])
                rows.append([model["label"], *about, score, guess])
        yield from table(["model", "task", "metric", "questions", "score", "guessing"], rows)

    @classmethod
    def columns(cls, models: Sequence[Results]) -> Iterator[Column]:
        """The mean over tasks."""
        values: list[Value | None] = []
        known = True
        for m in models:
            cells = cells_of(m, cls.name)
            known &= all(c["interval"] for c in cells)
            scores = [
                bounded(c, "score") if c["interval"] else (float(c["score"]), 0.0) for c in cells
            ]
            values.append(mean(scores) if scores else None)
        yield Column("short contexts, %, mean", values, percent, ranked=known)


@dataclass(frozen=True)
class Question:
    """Some text and four sentences, the first of which follows it.

    Args:
        document: index of the text's document.
        context: the text.
        choices: sentences.
    """

    document: int
    context: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """Where questions come from.

    Args:
        documents: held-out.
        encode: text to tokens, no special tokens added.
        decode: tokens to text.
        context_tokens: most tokens of a context.
        name: of the documents, for errors.
    """

    documents: Documents
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    context_tokens: int
    name: str

    def _piece(self, document: int, draw: Random) -> tuple[str, str] | None:
        """A text of whole sentences and the next sentence, at a random place."""
        size = self.context_tokens + BEYOND
        start = draw.randint(0, int(self.documents.lengths[document]) - size)
        text = self.decode(self.documents.tokens(document, start, start + size).tolist())
        parts, shown = sentences(text)[1:-1], list[str]()
        for sentence in parts:
            longer = [*shown, sentence]
            if len(self.encode(" ".join(longer))) > self.context_tokens:
                fine = WORDS[0] <= len(sentence.split()) <= WORDS[1]
                return (" ".join(shown), sentence) if shown and fine else None
            shown = longer
        return None

    def _some(self, document: int, draw: Random) -> tuple[str, str]:
        for _ in range(PATIENCE):
            if (found := self._piece(document, draw)) is not None:
                return found
        raise UserError(
            f"short: {self.name}, document {document}: no {self.context_tokens} tokens of whole "
            f"sentences with one of {WORDS[0]} to {WORDS[1]} words behind them"
        )

    def questions(self, count: int, seed: int) -> Iterator[Question]:
        """So many, fixed by the seed.

        Raises:
            UserError: if fewer than four documents are long enough.
        """
        fit = np.flatnonzero(self.documents.lengths >= self.context_tokens + BEYOND).tolist()
        if len(fit) < CHOICES:
            raise UserError(
                f"short: {self.name} has {len(fit)} documents of {self.context_tokens + BEYOND} "
                f"tokens or more, and continuation needs {CHOICES}: smaller short.context_tokens"
            )
        for index in range(count):
            draw = Random(f"{seed}/short/{index}")
            own, *others = draw.sample(fit, CHOICES)
            context, sentence = self._some(own, draw)
            wrong = [self._some(other, draw)[1] for other in others]
            yield Question(own, context, (sentence, *wrong))


def losses(
    model: nn.Module, prompt: Sequence[int], choices: Sequence[Sequence[int]]
) -> list[float]:
    """Mean negative log-likelihood per token of each continuation, nats.

    Args:
        model: see `longctx.eval.score.token_nll`.
        prompt: tokens before them.
        choices: tokens of each.
    """
    rows = [torch.tensor([*prompt, *choice]) for choice in choices]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, whole in enumerate(rows):
        mask[row, len(prompt) : len(whole)] = True
    parts = token_nll(model, tokens, mask).split([len(choice) for choice in choices])
    return [float(part.mean()) for part in parts]


def _answer(question: Question, index: int, subject: Subject) -> Sample:
    bos = subject.tokenizer.bos_token_id
    front = subject.encode(question.context)
    check_vocabulary(subject, max(front))
    # Tokens of a sentence where it follows the context, whatever the tokenizer puts in front.
    choices = [
        subject.encode(f"{question.context} {choice}")[len(front) :] for choice in question.choices
    ]
    prompt = [*([] if bos is None else [bos]), *front]
    found = losses(subject.model, prompt, choices)
    if not np.isfinite(found).all():
        raise UserError(
            f"short: the model's loss is not finite behind question {index}: try dtype=fp32"
        )
    best = [number for number, loss in enumerate(found) if loss == min(found)]
    return {
        "task": "short",
        "kind": "continuation",
        "index": index,
        "document": question.document,
        "prompt": question.context,
        "choices": list(question.choices),
        "losses": found,
        "tokens": len(prompt) + max(map(len, choices)),
        "answer": 0,
        "prediction": best[-1],
        "score": float(best == [0]),  # the right one is the first: a tie is no answer
    }


def _row(kind: str, metric: str, records: Sequence[Sample], guessing: float) -> dict[str, Any]:
    right, n = round(sum(r["score"] for r in records)), len(records)
    row: dict[str, Any] = {"kind": kind, "metric": metric, "samples": n, "score": right / n}
    return row | {"interval": list(wilson(right, n)), "guessing": guessing}


def _contents(folder: Path) -> str:
    """A hash of all files in a folder of tasks; data outside it is not hashed."""
    if not folder.is_dir() or not any(folder.rglob("*.yaml")):
        raise UserError(f"short.include={folder}: no task files (*.yaml of lm-eval's) there")
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"):
        digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
