"""Short contexts: what an extension of the window may have cost where it was not needed.

`continuation` (ours): the sentence that follows some held-out text among three of other documents;
the likeliest per token is the model's choice, guessing is right once in four. `boolq`, `piqa`,
`race`, `winogrande` and `mmlu` are lm-eval's own (`harness.py`); they need lm-eval and the hub, or
its cache. Costs four short forwards a question of ours.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import nn

from longctx.data.store import Store
from longctx.errors import UserError
from longctx.eval import harness
from longctx.eval.answers import wilson
from longctx.eval.ask import check_vocabulary
from longctx.eval.config import EvalConfig
from longctx.eval.ruler_data import sentences
from longctx.eval.score import token_nll
from longctx.eval.subject import Sample, Subject, TaskResult, open_store
from longctx.eval.windows import Documents

CHOICES = 4
WORDS = (4, 40)  # of a sentence that is told
BEYOND = 128  # tokens behind the context in which that sentence must lie
QUESTIONS = 1000  # of ours, where no number is given
PATIENCE = 100  # draws a question before the text is given up


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
        "score": float(best == [0]),  # the right one stands first: a tie is no answer
    }


def _row(kind: str, metric: str, records: Sequence[Sample], guessing: float) -> dict[str, Any]:
    right, n = round(sum(r["score"] for r in records)), len(records)
    row: dict[str, Any] = {"kind": kind, "metric": metric, "samples": n, "score": right / n}
    return row | {"interval": list(wilson(right, n)), "guessing": guessing}


def _reading(cfg: EvalConfig, subject: Subject) -> Reading:
    store: Store = open_store(cfg)
    size = cfg.short.context_tokens
    return Reading(store, subject.encode, subject.decode, size, str(store.path))


def inputs(cfg: EvalConfig) -> dict[str, Any]:
    """What the numbers depend on beside the settings.

    Raises:
        UserError: if there is no such store, or lm-eval is needed and missing.
    """
    own = cfg.short
    found: dict[str, Any] = {"seed": cfg.seed}
    if own.of_a_store:
        found["held_out"] = open_store(cfg).meta["digest"][:16]
    if theirs := [task for task in own.tasks if task != "continuation"]:
        found["lm_eval"] = harness.harness(theirs).__version__
    if own.include is not None:
        found["include"] = _contents(Path(own.include))
    return found


def _contents(folder: Path) -> str:
    """A hash of all files in a folder of tasks; data that stands elsewhere is not watched."""
    if not folder.is_dir() or not any(folder.rglob("*.yaml")):
        raise UserError(f"short.include={folder}: no task files (*.yaml of lm-eval's) there")
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"):
        digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def run(cfg: EvalConfig, subject: Subject) -> TaskResult:
    """The task: ours and lm-eval's.

    Args:
        cfg: the evaluation.
        subject: the model under test and its tokenizer.

    Returns:
        The result (`cells`: one row a task) and one record a question of ours.

    Raises:
        UserError: if the store cannot be used as asked, or lm-eval cannot run.
    """
    own, records, rows = cfg.short, list[Sample](), list[dict[str, Any]]()
    if own.of_a_store:
        count = own.samples or QUESTIONS
        asked = enumerate(_reading(cfg, subject).questions(count, cfg.seed))
        records = subject.journal.each(
            "continuation", asked, lambda pair: _answer(pair[1], pair[0], subject), total=count
        )
        rows.append(_row("continuation", "acc per token", records, 1 / CHOICES))
    theirs = [task for task in own.tasks if task != "continuation"]
    rows += subject.journal.each(
        "lm-eval", theirs, lambda task: harness.ask(task, cfg, subject), unit="task", alone=True
    )
    return {"context_tokens": own.context_tokens, "cells": rows}, records
