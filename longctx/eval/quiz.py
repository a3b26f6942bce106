"""Prompts with a key to find, over length x depth or distance; scored by all tokens of the answer.

`teacher_forced` reads the answer off one forward per prompt; `generate` decodes it through the
model's own cache, several times dearer, and must agree: it is there to test caches.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn

from longctx.config.typed import choice
from longctx.data.passkey_text import Encode, Passkey, build
from longctx.errors import UserError
from longctx.eval.answers import wilson
from longctx.eval.evaluation import Evaluation
from longctx.eval.journal import Journal
from longctx.eval.score import argmax_tokens, evaluating, greedy
from longctx.eval.subject import Subject
from longctx.eval.task import Sample

MODES = {
    "teacher_forced": "read off one forward pass (what greedy decoding would say)",
    "generate": "decoded greedily",
}

# encode, BOS, length, depth, seed, index
Write = Callable[[Encode, int | None, int, float, int, int], Passkey]


@dataclass(frozen=True)
class Trial:
    """One prompt and the cell it belongs to.

    Args:
        prompt: tokens with the answer at the end.
        length: length asked for, tokens.
        depth: where the key stands, 0 (start) to 1 (end); None in a k_max trial.
        k: nominal distance from the key to the end, tokens; None in a grid trial.
        index: number of the trial in its cell.
    """

    prompt: Passkey
    length: int
    depth: float | None
    k: int | None
    index: int

    def __post_init__(self) -> None:
        assert len(self.prompt.tokens) <= self.length, "a prompt is never truncated"


@dataclass(frozen=True)
class Quiz:
    """Who is asked, and how.

    Args:
        model: see `longctx.eval.score.token_nll`; mode `generate` needs transformers' `generate`.
        encode: text to tokens, no special tokens added.
        bos_id: first token of every prompt; None: nothing.
        samples: prompts per cell, each with its own key.
        seed: of the keys.
        mode: `teacher_forced | generate`.
        batch_tokens: tokens in one forward pass, unless a single prompt is longer.
        journal: keeps what is answered, a batch at a time.
    """

    model: nn.Module
    encode: Encode
    bos_id: int | None
    samples: int
    seed: int
    mode: str
    batch_tokens: int
    journal: Journal = field(default_factory=Journal)


def quiz_of(cfg: Evaluation, subject: Subject, mode: str, samples: int) -> Quiz:
    """The quiz of an evaluation, in this mode and with this many prompts a cell."""
    bos, journal = subject.tokenizer.bos_token_id, subject.journal
    own = (subject.model, subject.encode, bos, samples)
    return Quiz(*own, cfg.seed, mode, cfg.batch_tokens, journal)


def check_depths(depths: Sequence[float], key: str) -> None:
    """Raises UserError unless there are depths, all from 0 to 1."""
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise UserError(f"{key}={list(depths)} must be numbers from 0 to 1")


def check_mode(mode: str, key: str) -> None:
    """Raises UserError unless `mode` is one of `MODES`."""
    choice(mode, tuple(MODES), key)


def _batches(trials: Iterable[Trial], batch_tokens: int) -> Iterator[list[Trial]]:
    batch: list[Trial] = []
    for trial in trials:
        widest = max(len(t.prompt.tokens) for t in [*batch, trial])
        if batch and widest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(trial)
    if batch:
        yield batch


def _teacher_forced(model: nn.Module, batch: Sequence[Trial]) -> list[list[int]]:
    """The most likely answer tokens of each prompt, one forward for all.

    Shorter prompts are padded on the right, which a causal model never sees.
    """
    rows = [torch.tensor(t.prompt.tokens) for t in batch]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, trial in enumerate(batch):
        mask[row, slice(*trial.prompt.answer)] = True
    sizes = [t.prompt.answer[1] - t.prompt.answer[0] for t in batch]
    return [part.tolist() for part in argmax_tokens(model, tokens, mask).split(sizes)]


def _generated(model: nn.Module, batch: Sequence[Trial]) -> list[list[int]]:
    """Greedy continuations, a prompt at a time, through the model's cache."""
    with evaluating(model):
        return [
            greedy(model, trial.prompt.tokens[:start], stop - start)
            for trial in batch
            for start, stop in [trial.prompt.answer]
        ]


def run_trials(quiz: Quiz, trials: Iterable[Trial], total: int, task: str) -> list[Sample]:
    """Answers every trial.

    Args:
        quiz: model and mode.
        trials: prompts, taken as they are needed.
        total: how many.
        task: their name in the records.

    Returns:
        Flat records in the order of the trials, the lines of `samples.jsonl`.
    """
    answer = _teacher_forced if quiz.mode == "teacher_forced" else _generated

    def ask(batch: list[Trial]) -> list[Sample]:
        answers = answer(quiz.model, batch)
        return [_record(quiz, task, t, a) for t, a in zip(batch, answers, strict=True)]

    batches = _batches(trials, quiz.batch_tokens)
    done = quiz.journal.each(task, batches, ask, total=total, size=len)
    return [record for batch in done for record in batch]


def _record(quiz: Quiz, task: str, trial: Trial, predicted: list[int]) -> Sample:
    prompt = trial.prompt
    answer = prompt.tokens[slice(*prompt.answer)]
    return {
        "task": task,
        "mode": quiz.mode,
        "length": trial.length,
        "depth": trial.depth,
        "k": trial.k,
        "distance": prompt.distance,
        "seed": quiz.seed,
        "index": trial.index,
        "key": prompt.key,
        "tokens": len(prompt.tokens),
        "answer": answer,
        "predicted": predicted,
        "correct": predicted == answer,
    }


def rate(samples: Sequence[Sample], **cell: float | int) -> dict[str, Any]:
    """The result row of the records in which these keys have these values."""
    inside = [s for s in samples if all(s[key] == value for key, value in cell.items())]
    counts, right = [s["tokens"] for s in inside], sum(s["correct"] for s in inside)
    return {
        **cell,
        "rate": right / len(inside),
        "rate_interval": list(wilson(right, len(inside))),
        "samples": len(inside),
        "tokens": [min(counts), max(counts)],
        "distance": [min(s["distance"] for s in inside), max(s["distance"] for s in inside)],
    }


def found_at(cells: Sequence[dict[str, Any]]) -> dict[int, tuple[int, int]]:
    """(keys found, prompts) at each length, over all depths."""
    found = {}
    for length in {c["length"] for c in cells}:
        inside = [c for c in cells if c["length"] == length]
        right = round(sum(c["rate"] * c["samples"] for c in inside))
        found[length] = right, sum(c["samples"] for c in inside)
    return found


def grid(
    quiz: Quiz,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    task: str,
    write: Write = build,
) -> tuple[dict[str, Any], list[Sample]]:
    """Success rate in each cell of length x depth.

    Args:
        quiz: model, prompts and mode.
        lengths: prompt lengths, tokens, answer included.
        depths: places of the key, 0 (start) to 1 (end).
        task: its name in the records.
        write: makes the prompts.

    Returns:
        The result (`cells`: one row a cell) and one record a prompt.
    """

    def trials() -> Iterator[Trial]:
        for length, depth, index in product(lengths, depths, range(quiz.samples)):
            prompt = write(quiz.encode, quiz.bos_id, length, depth, quiz.seed, index)
            yield Trial(prompt, length, depth, None, index)

    total = len(lengths) * len(depths) * quiz.samples
    records = run_trials(quiz, trials(), total, task)
    cells = [rate(records, length=le, depth=de) for le, de in product(lengths, depths)]
    mean = sum(cell["rate"] for cell in cells) / len(cells)
    return {"mode": quiz.mode, "mean": mean, "truncated_prompts": 0, "cells": cells}, records
