"""Evaluates the model in the middle of a run, through the engine that trains it.

`Running.score` is one forward pass of the engine's own module, so it works under every ZeRO stage
and with rows spread over ranks; no second copy of the model and no `s x v` logits. Training
continues as if nothing had happened: mode and random state are restored.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from longctx.batch import IGNORE, Batch
from longctx.parallel.mesh import Mesh, shard
from longctx.parallel.zero import Engine
from longctx.train.loss import LOGITS_BYTES

Score = Callable[[Any, Batch], Any]


class Running:
    """The model in training, as an evaluation sees it.

    Args:
        engine: called as `engine(**tensors)`.
        module: what the engine runs; its `score(model, batch)` is exchanged for a while.
        mesh: the ranks. All of them must call `score` equally often, with rows of equal length.
    """

    def __init__(self, engine: Engine, module: Any, mesh: Mesh) -> None:
        self._engine, self._module, self._mesh = engine, module, mesh

    @property
    def dp_rank(self) -> int:
        """Which share of the rows is this rank's."""
        return self._mesh.dp_rank

    @property
    def dp_size(self) -> int:
        """How many shares there are."""
        return self._mesh.dp_size

    @property
    def sp_size(self) -> int:
        """How many ranks share a row, each with a part: a row's length must be a multiple."""
        return self._mesh.sp_size

    def sums(self, values: list[float]) -> list[float]:
        """The sum of each value over all ranks."""
        return self._mesh.sums(*values)

    def score(self, batch: Batch) -> list[list[float]]:
        """NLL in nats, scored tokens and wrong greedy tokens of each row, `[3][b]`.

        Where ranks share a row it is of this rank's part: sum over all ranks.

        Args:
            batch: whole rows, alike on the ranks that share them.
        """
        part = shard(batch, self._mesh).to(self._mesh.device)
        found: Any = self._engine(**part.tensors())
        rows: list[list[float]] = found.double().tolist()
        return rows

    @contextmanager
    def questions(self) -> Iterator["Running"]:
        """No gradients and no dropout inside; mode and random state are restored afterwards."""
        devices = [self._mesh.device] if self._mesh.device.type == "cuda" else []
        usual, self._module.score = self._module.score, row_scores
        self._engine.train(False)
        try:
            with torch.random.fork_rng(devices), torch.no_grad():
                yield self
        finally:
            self._module.score = usual
            self._engine.train(True)


def row_scores(model: Any, batch: Batch) -> Tensor:
    """NLL, scored tokens and wrong greedy tokens of each row, `[3 b]` fp32.

    The head runs as often on every rank, however many labels each of them scores: ZeRO-3 needs it.

    Args:
        model: a decoder with `get_decoder()` and `get_output_embeddings()`.
        batch: rows, or a rank's part of them.
    """
    decoder = model.get_decoder()
    hidden = decoder(
        input_ids=batch.tokens, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    head, scored = model.get_output_embeddings(), batch.labels != IGNORE
    states, targets, rows = hidden[scored], batch.labels[scored], scored.nonzero()[:, 0]
    pieces = -(-batch.labels.numel() // max(1, LOGITS_BYTES // (4 * head.out_features)))
    found = torch.zeros(3, len(batch.tokens), device=hidden.device)
    for state, target, row in zip(
        *(x.tensor_split(pieces) for x in (states, targets, rows)), strict=True
    ):
        logits = head(state).float()
        nll = cross_entropy(logits, target, reduction="none")
        wrong = logits.argmax(-1) != target
        found.index_add_(1, row, torch.stack([nll, torch.ones_like(nll), wrong.to(nll)]))
    return found
