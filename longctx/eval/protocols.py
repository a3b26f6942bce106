"""Four named perplexity protocols; reports name the protocol with every number.

- `sliding_new_tokens` (Position Interpolation, Press et al.): a window moves by the stride and
  only its new tokens are scored. One forward of W tokens per stride: the dearest, and the one
  papers print.
- `whole_window` (LongLoRA 2309.12307 and DCA 2402.17463, their evaluation code): a window starts
  every S tokens of all documents as one stream, crosses their borders, and all of its W - 1 targets
  are scored. Early targets see little, so it lies above `sliding_new_tokens` at the same W. One
  forward of W tokens per stride; the last partial window is dropped.
- `single_pass_buckets`: one forward per document; NLL by position. The cheapest, a whole curve
  at once; but early and late positions hold different text.
- `token_matched`: the same target tokens under every length, so only the context differs. One
  forward per length and window; the one to compare lengths with.

All take the same documents, those as long as the longest length asked for. BOS is at the
start of a document, so windows that begin inside one carry none (`bos: document_start`).
CEPE's protocols are those of the task `contexts`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from longctx.eval.journal import Journal
from longctx.eval.scored_windows import (
    Documents,
    FloatArray,
    Window,
    matched_ends,
    mean_of,
    mean_over,
    score_windows,
    sum_windows,
)

FIRST_BUCKET = 16  # shorter contexts share one bucket


@dataclass(frozen=True)
class Text:
    """What is scored.

    Args:
        documents: the store.
        chosen: indices of its documents that are scored.
        batch_tokens: tokens in one forward pass, unless a single window is longer.
        journal: keeps what is scored, a batch at a time.
    """

    documents: Documents
    chosen: Sequence[int]
    batch_tokens: int
    journal: Journal = field(default_factory=Journal)

    def nll(self, model: nn.Module, plan: Sequence[Window], title: str) -> list[FloatArray]:
        """Scores a plan; see `longctx.eval.scored_windows.score_windows`."""
        return score_windows(
            model, self.documents, plan, self.batch_tokens, title, journal=self.journal
        )


def sliding_windows(document: int, tokens: int, window: int, stride: int) -> Iterator[Window]:
    """Every token after the first is scored exactly once, with at least W - S tokens before it.

    Source: Position Interpolation (2306.15595) section 3.2, after Press et al. (2012.15832).
    The last window ends with the document and is as wide as the others.

    Args:
        document: its index.
        tokens: how many of its tokens take part.
        window: W, tokens.
        stride: S < W, tokens.
    """
    done = min(window, tokens)
    yield Window(document, 0, done, 1)
    while done < tokens:
        stop = min(done + stride, tokens)
        yield Window(document, stop - window, stop, done)
        done = stop


def sliding_new_tokens(
    model: nn.Module,
    text: Text,
    lengths: Sequence[int],
    stride: int,
    document_tokens: int | None,
) -> dict[str, Any]:
    """Perplexity with a sliding window, one row per window width.

    Args:
        model: see `longctx.eval.score.token_nll`.
        text: the documents.
        lengths: window widths W, tokens.
        stride: S, tokens.
        document_tokens: documents are cut to this length, but never below the widest window; None:
            whole documents.
    """
    assert stride < min(lengths), "a window must see something before what it scores"
    limit = None if document_tokens is None else max(document_tokens, *lengths)
    whole = [int(text.documents.lengths[i]) for i in text.chosen]
    cut = whole if limit is None else [min(tokens, limit) for tokens in whole]
    rows = []
    for length in lengths:
        plan = [
            window
            for i, tokens in zip(text.chosen, cut, strict=True)
            for window in sliding_windows(i, tokens, length, stride)
        ]
        nlls = text.nll(model, plan, f"sliding {length}")
        rows.append({"length": length, **mean_over(plan, nlls).row()})
    return {"stride": stride, "document_tokens": limit, "rows": rows}


def bucket_ends(length: int) -> list[int]:
    """Powers of two from `FIRST_BUCKET` up, closed by `length`.

    A token with p tokens before it belongs to the first bucket whose end is above p.
    """
    ends = []
    end = FIRST_BUCKET
    while end < length:
        ends.append(end)
        end *= 2
    return [*ends, length]


def bucket_gain(ends: Sequence[int], nll: Sequence[float], se: Sequence[float | None]) -> int:
    """The largest position p with NLL(p) < NLL(p/2) - 2 s.e.: context beyond p/2 still helps.

    Args:
        ends: bucket ends, rising.
        nll: mean NLL of each bucket.
        se: standard error of each; the two of a pair are added in quadrature. None is 0.

    Returns:
        The end of that bucket; 0 if no bucket is better than the one before it.
    """
    gain = 0
    for i in range(1, len(ends)):
        error = float(np.hypot(se[i] or 0.0, se[i - 1] or 0.0))
        if nll[i] < nll[i - 1] - 2 * error:
            gain = ends[i]
    return gain


def single_pass_buckets(
    model: nn.Module,
    text: Text,
    lengths: Sequence[int],
) -> dict[str, Any]:
    """One forward over the first L tokens of each document, one row per L, NLL by position.

    Args:
        model: see `longctx.eval.score.token_nll`.
        text: the documents.
        lengths: L, tokens. A causal model of fixed positions gives the same curve in each, up to
            L; methods that look at the whole length (dynamic NTK) do not.
    """
    rows = []
    for length in lengths:
        plan = [Window(i, 0, length, 1) for i in text.chosen]
        nlls = text.nll(model, plan, f"single pass {length}")
        ends = bucket_ends(length)
        starts = [1, *ends[:-1]]
        means = [
            mean_over(plan, [nll[start - 1 : end - 1] for nll in nlls])
            for start, end in zip(starts, ends, strict=True)
        ]
        buckets = [
            {"start": start, "end": end, **mean.row()}
            for start, end, mean in zip(starts, ends, means, strict=True)
        ]
        gain = bucket_gain(ends, [m.nll for m in means], [m.se for m in means])
        whole = mean_over(plan, nlls).row()
        rows.append({"length": length, **whole, "bucket_gain": gain, "buckets": buckets})
    return {"rows": rows}


def token_matched(
    model: nn.Module,
    text: Text,
    lengths: Sequence[int],
    target_tokens: int,
    windows: int,
) -> dict[str, Any]:
    """NLL of the same target tokens, the last T of each window, under every window width.

    Args:
        model: see `longctx.eval.score.token_nll`.
        text: the documents.
        lengths: window widths L, tokens: a target sees L - T to L - 1 tokens before it.
        target_tokens: T, tokens.
        windows: most places in each document, evenly spaced, never overlapping.
    """
    assert target_tokens < min(lengths), "a window must see something before what it scores"
    ends = matched_ends(text.documents, text.chosen, max(lengths), target_tokens, windows)
    rows = []
    for length in lengths:
        plan = [Window(i, end - length, end, end - target_tokens) for i, end in ends]
        nlls = text.nll(model, plan, f"token matched {length}")
        rows.append({"length": length, **mean_over(plan, nlls).row()})
    return {"target_tokens": target_tokens, "windows": len(ends), "rows": rows}


@dataclass(frozen=True)
class Stream:
    """The first tokens of some documents, one after the other, read like a store of one document.

    Args:
        documents: the store.
        chosen: indices of its documents.
        taken: how many tokens of each.
    """

    documents: Documents
    chosen: Sequence[int]
    taken: Sequence[int]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[1]` all tokens."""
        return np.array([sum(self.taken)])

    @property
    def ends(self) -> list[int]:
        """Where each document ends in the stream."""
        return list(accumulate(self.taken))

    def tokens(self, i: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer[Any]]:
        """Tokens `start:stop` of the stream."""
        stop = int(self.lengths[0]) if stop is None else stop
        parts = []
        for document, taken, end in zip(self.chosen, self.taken, self.ends, strict=True):
            first, last = max(start - end + taken, 0), min(stop - end + taken, taken)
            if first < last:
                parts.append(self.documents.tokens(document, first, last))
        return np.concatenate(parts)


def whole_window(
    model: nn.Module,
    text: Text,
    lengths: Sequence[int],
    stride: int,
    document_tokens: int | None,
) -> dict[str, Any]:
    """Perplexity over whole windows, one row per window width.

    Args:
        model: see `longctx.eval.score.token_nll`.
        text: the documents.
        lengths: window widths W, tokens.
        stride: S, tokens.
        document_tokens: documents are cut to this length, but never below the widest window; None:
            whole documents.

    Returns:
        Rows of equally many tokens a window, so the mean over tokens is the mean of means; the
        error is over documents, by where a window starts.

    Raises:
        UserError: if a loss is not finite.
    """
    limit = None if document_tokens is None else max(document_tokens, *lengths)
    whole = [int(text.documents.lengths[i]) for i in text.chosen]
    stream = Stream(text.documents, text.chosen, [min(n, limit or n) for n in whole])
    ends, rows = np.array(stream.ends), []
    for length in lengths:
        starts = range(0, int(stream.lengths[0]) - length + 1, stride)
        plan = [Window(0, start, start + length, start + 1) for start in starts]
        title = f"whole window {length}, sums"
        batch, journal = text.batch_tokens, text.journal
        sums = sum_windows(model, stream, plan, batch, title, journal)
        owners = np.searchsorted(ends, np.array(starts), side="right").tolist()
        mean = mean_of(owners, sums, [length - 1] * len(plan))
        rows.append({"length": length, "windows": len(plan), **mean.row()})
    return {"stride": stride, "document_tokens": limit, "rows": rows}
