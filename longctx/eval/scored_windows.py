"""Windows of documents: which tokens the model sees, and which of them are scored.

A perplexity protocol is a list of them; planning it costs nothing, `score_windows` costs one
forward per window, batched up to a number of tokens.
"""

from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from longctx.errors import UserError
from longctx.eval.journal import Journal
from longctx.eval.score import token_nll

FloatArray = NDArray[np.float64]


class Documents(Protocol):
    """What is read of a token store."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[documents]` tokens in each."""
        ...

    def tokens(self, i: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer[Any]]:
        """Tokens `start:stop` of document `i`."""
        ...


@dataclass(frozen=True)
class Window:
    """Tokens `start:stop` of a document are seen, `first:stop` are scored (`first > start`).

    Args:
        document: its index.
        start: first token seen.
        stop: one past the last token.
        first: first token scored.
        contexts: what is read beside or before them, in this order: (document, first token, one
            past the last) of each, all of one size.
    """

    document: int
    start: int
    stop: int
    first: int
    contexts: tuple[tuple[int, int, int], ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(tokens seen, tokens scored, context tokens)."""
        size = sum(stop - start for _, start, stop in self.contexts)
        return self.stop - self.start, self.stop - self.first, size


@dataclass(frozen=True)
class Mean:
    """A mean over tokens, with its standard error.

    Args:
        nll: mean negative log-likelihood, nats.
        se: standard error of `nll` over clusters; None with fewer than two clusters.
        tokens: how many tokens were scored.
        clusters: how many independent pieces of text they come from.
    """

    nll: float
    se: float | None
    tokens: int
    clusters: int

    def row(self) -> dict[str, float | int | None]:
        """The numbers of a result row; the error of the perplexity is by the delta method."""
        perplexity = float(np.exp(self.nll))
        error = None if self.se is None else perplexity * self.se
        return {
            "perplexity": perplexity,
            "perplexity_se": error,
            "nll": self.nll,
            "nll_se": self.se,
            "tokens": self.tokens,
            "clusters": self.clusters,
        }


def evenly(count: int, wanted: int | None) -> list[int]:
    """At most `wanted` of the indices `0..count-1`, evenly spaced, both ends included."""
    if wanted is None or wanted >= count:
        return list(range(count))
    if wanted == 1:
        return [0]
    return [i * (count - 1) // (wanted - 1) for i in range(wanted)]


def choose_documents(
    documents: Documents,
    length: int,
    max_documents: int | None,
    where: str,
    asked: str = "lengths ask",
) -> tuple[list[int], int]:
    """Documents of at least `length` tokens, evenly spaced over the store.

    Args:
        documents: the store.
        length: the longest length asked for, tokens.
        max_documents: how many at most; None: all.
        where: the store's name, for the error.
        asked: what asks for that length, for the error.

    Returns:
        Their indices, and how many shorter documents were skipped.

    Raises:
        UserError: if no document is long enough.
    """
    fit = np.flatnonzero(documents.lengths >= length)
    if not len(fit):
        longest = int(documents.lengths.max(initial=0))
        raise UserError(
            f"{asked} for {length} tokens, but the longest document of {where} has {longest}"
        )
    chosen = [int(fit[i]) for i in evenly(len(fit), max_documents)]
    return chosen, len(documents.lengths) - len(fit)


def matched_ends(
    documents: Documents, chosen: Sequence[int], longest: int, target_tokens: int, windows: int
) -> list[tuple[int, int]]:
    """Where windows of up to `longest` tokens end: (document, one past their last token).

    Args:
        documents: the store.
        chosen: indices of its documents, each of at least `longest` tokens.
        longest: tokens before an end that must be in the document.
        target_tokens: the last tokens before an end; they never overlap.
        windows: most windows in each document, evenly spaced.
    """
    ends: list[tuple[int, int]] = []
    for i in chosen:
        room = int(documents.lengths[i]) - longest
        places = evenly(room + 1, min(windows, room // target_tokens + 1))
        ends += [(i, longest + place) for place in places]
    return ends


def _batches(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Runs of windows of one shape, each at most `batch_tokens` (and at least one window)."""
    batch: list[Window] = []
    for window in windows:
        own, _, contexts = window.shape
        full = (len(batch) + 1) * (own + contexts) > batch_tokens
        if batch and (full or window.shape != batch[0].shape):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _read(
    documents: Documents, batch: Sequence[Window], contexts: Documents
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens `[b s]` of a batch, and its contexts `[b c l]` if it has any."""
    rows = [documents.tokens(w.document, w.start, w.stop) for w in batch]
    tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
    if not batch[0].contexts:
        return tokens, None
    beside = [[contexts.tokens(*span) for span in w.contexts] for w in batch]
    return tokens, torch.from_numpy(np.array(beside).astype(np.int64))


def score_windows(
    model: nn.Module,
    documents: Documents,
    windows: Sequence[Window],
    batch_tokens: int,
    title: str,
    *,
    contexts: Documents | None = None,
    in_front: bool = False,
    journal: Journal | None = None,
) -> list[FloatArray]:
    """NLL of the scored tokens of each window, in the windows' order.

    Args:
        model: see `longctx.eval.score.token_nll`.
        documents: the store the windows point into.
        windows: the plan.
        batch_tokens: tokens in one forward pass, unless a single window is longer.
        title: of the progress bar.
        contexts: the store that the windows' contexts point into; None: `documents`.
        in_front: see `longctx.eval.score.token_nll`.
        journal: keeps what is scored, a batch at a time.

    Returns:
        One `[scored]` fp64 array a window, nats.

    Raises:
        UserError: if a loss is not finite.
    """

    def score(batch: list[Window]) -> str:
        beside = documents if contexts is None else contexts
        nll = _score(model, documents, batch, title, beside, in_front)
        return b64encode(nll.astype("<f4").tobytes()).decode()  # exact, and a third of decimals

    batches = list(_batches(windows, batch_tokens))
    done = (journal or Journal()).each(title, batches, score, unit="window", size=len)
    result: list[FloatArray] = []
    for batch, packed in zip(batches, done, strict=True):
        nll = np.frombuffer(b64decode(packed), "<f4").astype(np.float64)
        result.extend(nll.reshape(len(batch), -1))
    return result


def sum_windows(
    model: nn.Module,
    documents: Documents,
    windows: Sequence[Window],
    batch_tokens: int,
    title: str,
    journal: Journal | None = None,
) -> list[float]:
    """Sums of the losses of `score_windows`, for plans that score a token many times.

    Args:
        model: as in `score_windows`, like all the others.
        documents: the store the windows point into.
        windows: the plan.
        batch_tokens: tokens in one forward pass, unless a single window is longer.
        title: of the progress bar.
        journal: keeps what is scored, a batch at a time.

    Returns:
        A sum a window, nats: 8 bytes each in memory, whatever its width.

    Raises:
        UserError: if a loss is not finite.
    """

    def score(batch: list[Window]) -> list[float]:
        nll = _score(model, documents, batch, title, documents).astype(np.float64)
        return [float(row.sum()) for row in nll.reshape(len(batch), -1)]

    batches = list(_batches(windows, batch_tokens))
    done = (journal or Journal()).each(title, batches, score, unit="window", size=len)
    return [total for sums in done for total in sums]


def _score(
    model: nn.Module,
    documents: Documents,
    batch: Sequence[Window],
    title: str,
    contexts: Documents,
    in_front: bool = False,
) -> NDArray[np.float32]:
    """NLL of the scored tokens of a batch of windows of one shape, one behind the other."""
    tokens, beside = _read(documents, batch, contexts)
    scored = slice(batch[0].first - batch[0].start, None)
    nll: NDArray[np.float32] = token_nll(model, tokens, scored, beside, in_front).numpy()
    if not np.isfinite(nll).all():
        raise UserError(
            f"{title}: the model's loss is not finite in document {batch[0].document} at "
            f"token {batch[0].start}: try dtype=fp32"
        )
    return nll


def mean_over(windows: Sequence[Window], nlls: Sequence[FloatArray]) -> Mean:
    """Mean NLL = (sum over all tokens) / (their number), and its standard error.

    Tokens of one text are correlated, so the error is that of a ratio over clusters: documents,
    or windows where only one document was scored.

    Args:
        windows: where each array comes from.
        nlls: one array of scored tokens a window; empty arrays are ignored.
    """
    used = [(w, n) for w, n in zip(windows, nlls, strict=True) if len(n)]
    owners, scored = [w.document for w, _ in used], [n for _, n in used]
    return mean_of(owners, [float(n.sum()) for n in scored], [len(n) for n in scored])


def mean_of(documents: Sequence[int], nlls: Sequence[float], tokens: Sequence[int]) -> Mean:
    """The mean of `mean_over` from the sum and the number of scored tokens of each window.

    Args:
        documents: where each window is, or starts.
        nlls: sums, nats.
        tokens: how many in each, above 0.
    """
    by_document = len(set(documents)) > 1
    cluster = list(documents) if by_document else list(range(len(documents)))
    _, index = np.unique(np.array(cluster), return_inverse=True)
    sums = np.bincount(index, weights=nlls)
    counts = np.bincount(index, weights=tokens)
    total, k = counts.sum(), len(counts)
    mean = float(sums.sum() / total)
    se = None
    if k > 1:
        se = float(sqrt(k / (k - 1) * np.square(sums - mean * counts).sum()) / total)
    return Mean(mean, se, int(total), k)
