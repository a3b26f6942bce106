"""Passkey retrieval over length x depth, and Position Interpolation's effective window k_max.

Scored by exact match of all answer tokens. `teacher_forced` reads the answer off one forward per
prompt; `generate` decodes it through the model's own cache, several times dearer, and must agree:
it is there to test caches.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn

from longctx.data.passkey_text import Encode, Passkey, build, build_at_distance
from longctx.eval.answers import wilson
from longctx.eval.context import greedy
from longctx.eval.journal import Journal
from longctx.eval.score import argmax_tokens, evaluating
from longctx.eval.subject import Sample

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


def _rate(samples: Sequence[Sample], **cell: float | int) -> dict[str, Any]:
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


def passkey(
    quiz: Quiz,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    task: str = "passkey",
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
    cells = [_rate(records, length=le, depth=de) for le, de in product(lengths, depths)]
    mean = sum(cell["rate"] for cell in cells) / len(cells)
    return {"mode": quiz.mode, "mean": mean, "truncated_prompts": 0, "cells": cells}, records


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
    for k, rate in sorted(zip(distances, rates, strict=True)):
        if rate < threshold:
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
    cells = [_rate(records, k=k) for k in distances]
    return {
        "mode": quiz.mode,
        "target": target,
        "k_max": k_max(distances, [cell["rate"] for cell in cells], threshold),
        "threshold": threshold,
        "truncated_prompts": 0,
        "cells": cells,
    }, records
