"""Perplexity and passkeys inside a training run: curves against steps, not a report.

Token-matched windows of held-out documents and teacher-forced passkeys, a row a pass and rank: a
few forward passes each time, no second model and no cache. The trainer knows none of it: it gets a
function of the model that runs, and writes down the numbers that it returns.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any, Protocol

import numpy as np
import torch

from longctx.batch import IGNORE, Batch
from longctx.config import RunConfig
from longctx.config.in_loop import InLoopConfig
from longctx.data.passkey_text import build
from longctx.data.store import Store, tokenizer_sha256
from longctx.errors import UserError
from longctx.eval.scored_windows import choose_documents
from longctx.models.load import load_tokenizer, local_tokenizer


class Running(Protocol):
    """The model in training; see `longctx/train/probe.py`."""

    @property
    def dp_rank(self) -> int:
        """Which share of the rows is this rank's."""
        ...

    @property
    def dp_size(self) -> int:
        """How many shares there are."""
        ...

    @property
    def sp_size(self) -> int:
        """How many ranks share a row."""
        ...

    def sums(self, values: list[float]) -> list[float]:
        """The sum of each value over all ranks."""
        ...

    def score(self, batch: Batch) -> list[list[float]]:
        """NLL, scored tokens and wrong tokens of each row, of this rank's part of it."""
        ...


@dataclass(frozen=True)
class Row:
    """Tokens, of which the last `scored` count.

    Args:
        tokens: of one document or prompt.
        scored: how many.
    """

    tokens: Sequence[int]
    scored: int

    def batch(self, length: int) -> Batch:
        """A batch of one row, filled up on the right, where nothing is scored, to a length."""
        count = len(self.tokens)
        assert count <= length, "nothing is ever truncated"
        tokens, labels = torch.zeros(2, 1, length, dtype=torch.int64)
        tokens[0, :count] = torch.tensor(self.tokens)
        labels.fill_(IGNORE)
        labels[0, count - self.scored - 1 : count - 1] = tokens[0, count - self.scored : count]
        return Batch(tokens, labels, torch.arange(length)[None])


def probe(run: RunConfig) -> Callable[[Running], dict[str, float]] | None:
    """What the trainer calls every `in_loop.every` steps; None if that is never.

    Raises:
        UserError: if documents are missing or too short, a prompt does not fit, or the recipe's
            model reads what these tasks do not give.
    """
    own = run.in_loop
    if not own.every:
        return None
    if run.encoder.name != "none":
        raise UserError(
            f"in_loop.every={own.every}: recipe {run.name} reads contexts, and these tasks have "
            "none; its held-out loss (train.eval_every) has"
        )
    for length in own.lengths:
        if length % run.parallel.sp:
            raise UserError(
                f"in_loop.lengths={length} is not a multiple of parallel.sp={run.parallel.sp}"
            )
    tasks: dict[str, dict[int, list[Row]]] = {}
    if own.documents:
        tasks["perplexity"] = _windows(run, own)
    if own.passkeys:
        tasks["passkey"] = _passkeys(run, own)
    return lambda running: _numbers(running, tasks)


def _windows(run: RunConfig, own: InLoopConfig) -> dict[int, list[Row]]:
    """For each length, windows that end with the same target tokens."""
    if not run.data.held_out:
        raise UserError(f"in_loop.documents={own.documents} needs data.held_out=[DIR]")
    store, longest = Store(run.data.held_out[0]), max(own.lengths)
    tokenizer = run.model.tokenizer_path
    if tokenizer is not None:
        store.require_tokenizer(tokenizer_sha256(local_tokenizer(tokenizer)), tokenizer)
    where = str(store.path)
    chosen, _ = choose_documents(store, longest, own.documents, where, "in_loop.lengths ask")
    return {
        length: [
            Row(store.tokens(i, longest - length, longest).tolist(), own.target_tokens)
            for i in chosen
        ]
        for length in own.lengths
    }


def _passkeys(run: RunConfig, own: InLoopConfig) -> dict[int, list[Row]]:
    """Prompts with their answer, at depths from first to last."""
    where = run.model.tokenizer_path
    if where is None:
        raise UserError(f"in_loop.passkeys={own.passkeys} needs model.tokenizer=DIR")
    tokenizer: Any = load_tokenizer(where)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    def rows(length: int) -> Iterator[Row]:
        for index, depth in enumerate(np.linspace(0, 1, own.passkeys).tolist()):
            made = build(encode, tokenizer.bos_token_id, length, depth, 0, index)
            assert made.answer[1] == len(made.tokens)
            yield Row(made.tokens, made.answer[1] - made.answer[0])

    return {length: list(rows(length)) for length in own.lengths}


def _numbers(running: Running, tasks: dict[str, dict[int, list[Row]]]) -> dict[str, float]:
    """The curves' points: `eval_perplexity_LENGTH` and `eval_passkey_LENGTH` (share found)."""
    found = {}
    for task, by_length in tasks.items():
        for length, rows in by_length.items():
            nll, scored, wrong = _scores(running, rows, length)
            right = sum(not count for count in wrong) / len(rows)
            value = exp(min(sum(nll) / sum(scored), 700.0)) if task == "perplexity" else right
            found[f"eval_{task}_{length}"] = value
    return found


def _scores(running: Running, rows: Sequence[Row], length: int) -> list[list[float]]:
    """`[3][rows]`, the same on every rank; each makes as many passes, as ZeRO-3 needs."""
    own = [[0.0] * len(rows) for _ in range(3)]
    for first in range(0, len(rows), running.dp_size):
        number = first + running.dp_rank
        row = rows[min(number, len(rows) - 1)]  # one too many: read, and not counted
        found = running.score(row.batch(length))
        if number < len(rows):
            for kind, value in zip(own, found, strict=True):
                kind[number] = value[0]
    flat = running.sums([value for kind in own for value in kind])
    return [flat[i : i + len(rows)] for i in range(0, len(flat), len(rows))]
